"""The documentation runs: every Python block of the README and of docs/, and every command and picture they name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import longstride

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def _blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, code) of each fenced block of one language."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2]) for match in FENCE.finditer(text) if match[1] == language
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page run in reading order and share their names, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in _blocks(page, "python"):
        # Empty lines first, so that a traceback shows the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    assert namespace


def test_readme_shows_the_op() -> None:
    assert any("attention(" in code for _, code in _blocks(ROOT / "README.md", "python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_make_targets_and_commands_of_the_pages_exist() -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    help_text = subprocess.run(
        [sys.executable, "-m", "longstride", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for page in PAGES:
        shell = "\n".join(code for language in ("sh", "console", "bash") for _, code in _blocks(page, language))
        assert set(re.findall(r"^\$? ?make ([a-z-]+)", shell, re.MULTILINE)) <= rules
        for command in re.findall(r"^\$? ?(?:\S*/)?longstride ([a-z]+)", shell, re.MULTILINE):
            assert re.search(rf"\b{command}\b", help_text), f"{page.name}: longstride {command}"


def test_readme_lists_every_pattern() -> None:
    table = (ROOT / "README.md").read_text()
    patterns = [
        name
        for name in dir(longstride)
        if isinstance(value := getattr(longstride, name), type)
        and issubclass(value, longstride.Pattern)
        and value is not longstride.Pattern
    ]
    assert patterns
    assert [name for name in patterns if not re.search(rf"`{name}\(", table)] == []
