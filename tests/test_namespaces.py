"""`import longstride` loads torch and nothing heavier, and every public name is there."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PATTERNS = (
    "Causal",
    "Full",
    "Local",
    "Dilated",
    "Strided",
    "BlockLocal",
    "Summary",
    "Fixed",
    "LogSparse",
    "Global",
    "RandomBlocks",
    "BlockSparse",
    "per_head",
)
RECIPES = ("longformer", "bigbird", "mistral", "sparse_transformer_strided", "sparse_transformer_fixed", "gpt3")
FUNCTIONS = (
    "attention",
    "attention_cached",
    "cache_bytes",
    "explain",
    "plan",
    "parse",
    "reach",
    "PatternCache",
    "sparsify",
)
MODELS = (
    "SparseTransformerConfig",
    "SparseTransformerForCausalLM",
    "SparseTransformerForMaskedLM",
    "SparseTransformerForSequenceClassification",
)
ERRORS = (
    "LongstrideError",
    "PatternError",
    "ArgumentError",
    "UnsupportedError",
    "RecipeError",
    "DataError",
    "CheckpointError",
)
HEAVY = ("transformers", "accelerate", "matplotlib", "typer", "PIL", "triton", "yaml", "tensorboard", "safetensors")


def _modules_loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules after `statement` in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_loads_torch_and_nothing_heavier() -> None:
    # What torch loads by itself (numpy, where it is installed) is not ours to answer for.
    added = _modules_loaded_by("import longstride") - _modules_loaded_by("import torch")
    assert "longstride" in added
    assert not added & {*HEAVY, "numpy"}


def test_attention_itself_needs_nothing_heavier() -> None:
    run = "import torch, longstride as ls\nq = torch.randn(1, 1, 8, 4)\nls.attention(q, q, q, ls.Local(3))"
    assert not _modules_loaded_by(run) & {"transformers", "accelerate", "matplotlib", "typer", "PIL", "yaml"}


def test_help_needs_no_training_library() -> None:
    loaded = _modules_loaded_by(
        "from longstride.cli import main\nsys.argv = ['longstride', '--help']\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main()"
    )
    assert not loaded & {"transformers", "accelerate", "matplotlib"}


@pytest.mark.parametrize("name", [*PATTERNS, "Pattern", *RECIPES, *FUNCTIONS, *MODELS, *ERRORS])
def test_public_name(name: str) -> None:
    import longstride

    assert getattr(longstride, name) is not None
    assert name in dir(longstride)


def test_unknown_name_is_an_attribute_error() -> None:
    import longstride

    with pytest.raises(AttributeError, match="Stridded"):
        _ = longstride.Stridded


def test_what_needs_transformers_says_so_where_there_is_none() -> None:
    names = ("sparsify", "SparseTransformerForCausalLM")
    code = (
        "import sys\nsys.modules['transformers'] = None\nimport longstride\n"
        f"for name in {names}:\n    try:\n        getattr(longstride, name)\n"
        "    except ModuleNotFoundError as error:\n        print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        f"longstride.{name} needs the package transformers: pip install 'longstride[transformers]'" for name in names
    ]


def test_version_is_the_package_s() -> None:
    import longstride

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert longstride.__version__ == project["version"]
