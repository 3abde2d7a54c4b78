"""`chunkcache export | import`: chunks out of a store into one file, and into another store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from chunkcache.cli.options import ERR, Json, Store, Terms, chosen, opened
from chunkcache.tokens.token_text import shown

app = typer.Typer()

Pack = Annotated[Path, typer.Argument(help="The pack, by convention *.safetensors.")]


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, in a terminal only."""
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def export(
    pack: Pack,
    terms: Terms = None,
    store: Store = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: Json = False,
) -> None:
    """Write chunks to one file, with what leads to them, so that another store can have them.

    Ends with 1 if chunks were left out because they are damaged or went meanwhile.
    """
    from chunkcache.library.pack import export_pack

    with opened(store, ttl=0.0) as place, _bar() as progress:
        done = export_pack(place, pack, chosen(terms), overwrite=force, progress=progress)
    typer.echo(json.dumps(asdict(done), indent=2) if as_json else done)
    if done.left_out:
        raise typer.Exit(1)


@app.command("import")
def import_(
    pack: Pack,
    terms: Terms = None,
    store: Store = None,
    pin: Annotated[bool, typer.Option("--pin", help="They do not expire, and leave last.")] = False,
    as_json: Json = False,
) -> None:
    """Put the chunks of a file into a store. Each is checked, and what is there is skipped.

    Whoever made a pack decides what models say behind its texts: import those of people you trust.
    Ends with 1 if chunks were bad, or if the store has not kept all of them.
    """
    from chunkcache.library.unpack import import_pack

    with opened(store) as place, _bar() as progress:
        done = import_pack(place, pack, chosen(terms), pin=pin, progress=progress)
    typer.echo(json.dumps(asdict(done), indent=2) if as_json else done)
    for key, why in done.reasons.items():
        typer.echo(shown(f"{key}: {why}"), err=True)
    if done.bad or done.lost:
        raise typer.Exit(1)
