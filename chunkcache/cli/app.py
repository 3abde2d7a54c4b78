"""The command line."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from chunkcache.cli.bench import app as bench_commands
from chunkcache.cli.doctor import app as doctor_commands
from chunkcache.cli.errors import Commands
from chunkcache.cli.model import app as model_commands
from chunkcache.cli.pack import app as pack_commands
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
app.add_typer(pack_commands)


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


@app.command()
def demo(
    store: Annotated[
        str | None,
        typer.Option(help="URL of the store. Default: CHUNKCACHE_URL, else the embedded store."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A model's folder or hub id.")
    ] = "SmolLM2-135M-Instruct",
    tokens: Annotated[int, typer.Option(min=1, help="Length of the document, in tokens.")] = 2000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Ask two questions over one document, without a cache, cold and warm.

    Ends with 1 if the cache changed an answer, and with 2 if something is not set up right.
    """
    err = Console(file=sys.stderr)
    with Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        auto_refresh=False,  # a thread that draws would take time from what is measured
    ) as progress:
        task = progress.add_task("starting", total=None)
        progress.refresh()
        from chunkcache.cli import demo as work
        from chunkcache.samples import quiet_transformers

        progress.update(task, total=len(work.STEPS) + 1)

        def step(name: str) -> None:
            progress.update(task, advance=1, description=name, refresh=True)

        place = work.ready_store(store)
        with quiet_transformers():
            outcome = work.run_demo(place, model, tokens, max_new_tokens, step)
    if as_json:
        typer.echo(json.dumps(outcome.to_dict(), indent=2))
    else:
        outcome.print(Console())
    if not outcome.same:
        raise typer.Exit(1)


def main() -> None:
    """The entry point of the `chunkcache` command."""
    app()


if __name__ == "__main__":
    main()
