"""The command ``longstride``: one file a command, each of which imports what is heavy when it runs."""

from typing import Any

import typer
from typer.core import TyperGroup

from longstride.errors import LongstrideError


class ErrorsInOneLine(TyperGroup):
    """Prints our own errors, and those of the file system, as one line, and exits with 2; a bug has its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LongstrideError as error:
            message = str(error)
        except OSError as error:
            # A full disk or a folder without permission, wherever it shows.
            if error.strerror is None:
                raise
            where = f": {error.filename}" if error.filename else ""
            message = f"{error.strerror}{where}"
        except KeyboardInterrupt:
            typer.echo("\nStopped.", err=True)
            raise typer.Exit(130) from None
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    name="longstride",
    cls=ErrorsInOneLine,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Train Sparse Transformers on long sequences of bytes, look at attention patterns, and measure what they "
        "cost.\n\n"
        "Start with: longstride train --output runs/first\n\n"
        "It needs no data of yours, runs on a laptop, and says what to do next."
    ),
)


def _add_commands() -> None:
    # Imported here: at the top, the function `train` would hide the module `longstride.cli.train`.
    from longstride.cli.classify import classify
    from longstride.cli.evaluate import evaluate
    from longstride.cli.finetune import finetune
    from longstride.cli.plan import plan
    from longstride.cli.sample import sample
    from longstride.cli.show import show
    from longstride.cli.suggest import suggest
    from longstride.cli.train import train

    for command in (train, evaluate, sample, suggest, finetune, classify, show, plan):
        app.command()(command)


_add_commands()


def main() -> None:
    """Run the command line in `sys.argv`."""
    app(prog_name="longstride")
