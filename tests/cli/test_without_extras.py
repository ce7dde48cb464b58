"""The command on an installation that has the attention op alone."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from longstride.__main__ import main


def test_missing_packages_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def without_two(name: str, *args: Any) -> Any:
        return None if name in ("typer", "yaml") else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_two)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: the command line needs the packages typer, yaml: pip install 'longstride[train]'\n"
    )
