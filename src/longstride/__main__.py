"""The command ``longstride``, also as ``python -m longstride``."""

import importlib.util
import sys

#: What the extra `train` brings and the commands import when they run.
NEEDED = ("typer", "numpy", "yaml", "matplotlib", "transformers", "accelerate")


def main() -> None:
    """Run the command line in `sys.argv`; say what to install where only the attention op is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        what = "package" if len(missing) == 1 else "packages"
        print(
            f"error: the command line needs the {what} {', '.join(missing)}: pip install 'longstride[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from longstride import cli

    cli.main()


if __name__ == "__main__":
    main()
