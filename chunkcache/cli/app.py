"""The command line."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from chunkcache.cli.bench import app as bench_commands
from chunkcache.cli.doctor import app as doctor_commands
from chunkcache.cli.errors import Commands
from chunkcache.cli.model import app as model_commands
from chunkcache.cli.store import app as store_commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they may show local variables, and so a store's password
)
app.add_typer(store_commands)
app.add_typer(model_commands)
app.add_typer(doctor_commands)
app.add_typer(bench_commands)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chunkcache {version('chunkcache')}")
        raise typer.Exit


@app.callback()
def chunkcache(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Reuse the K/V cache of text met before, in HuggingFace Transformers, through Redis."""


def main() -> None:
    """The entry point of the `chunkcache` command."""
    app()


if __name__ == "__main__":
    main()
