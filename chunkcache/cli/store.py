"""`chunkcache ls | stats | show | purge | sweep | copy`: what is in a store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from textwrap import indent
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from chunkcache.cli.options import (
    ERR,
    DryRun,
    Json,
    Store,
    Terms,
    chosen,
    looked_into,
    opened,
)
from chunkcache.errors import SettingError
from chunkcache.inventory import catalog
from chunkcache.inventory.filters import NO_MATCH
from chunkcache.keys import VALUES
from chunkcache.stores.base import EXTRAS, ChunkStore, Listed, with_extras
from chunkcache.tokens.token_text import shown

app = typer.Typer()
_COLUMNS = ("model", "namespace", "tags", "positions", "codec", "created")
_UNBOUND = 1_000_000  # columns


@app.command()
def ls(
    terms: Terms = None,
    store: Store = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 50,
    as_json: Json = False,
) -> None:
    """List chunks, in no order. The first column is the beginning of the hash: `show` takes it."""
    if as_json:
        # Without a sign of life: one after the other is printed, however many there are.
        with opened(store, refresh_ttl=False) as place:
            _print_list(islice(catalog.entries(place, chosen(terms)), limit or None))
        return
    with looked_into(store) as place:
        found = list(islice(catalog.entries(place, chosen(terms)), limit or None))
    # Where no terminal is, a line is a chunk, however long.
    folds = sys.stdout.isatty()
    out = Console(width=None if folds else _UNBOUND)
    view = Table(box=None)
    sizes = ("MB", "state MB") if any(entry.state for entry in found) else ("MB",)
    for column in ("hash", *_COLUMNS, *sizes):
        view.add_column(
            column,
            overflow="fold",
            no_wrap=not folds,
            justify="right" if column in sizes else "left",
        )
    for entry in found:
        fields = {"created": "", **(entry.metadata or {})}
        fields["created"] = fields["created"][:16].replace("T", " ")
        cells = (escape(shown(fields.get(column, ""))) for column in _COLUMNS)
        megabytes = [f"{nbytes / 1e6:.2f}" for nbytes in (entry.total_bytes, entry.state)]
        view.add_row(shown(_hash(entry.key)[:12]), *cells, *megabytes[: len(sizes)])
    out.print(view)
    _tell_if_none(terms, len(found))
    if limit and len(found) == limit:
        typer.echo(f"the first {limit}; --limit 0 lists all", err=True)


def _tell_if_none(terms: Sequence[str] | None, count: int) -> None:
    """A mistyped term looks like an empty store."""
    if terms and not count:
        typer.echo(NO_MATCH, err=True)


def _print_list(entries: Iterable[Listed]) -> None:
    """As JSON, one at a time."""
    before = "["
    for entry in entries:
        typer.echo(before + "\n" + indent(json.dumps(asdict(entry), indent=2), "  "), nl=False)
        before = ","
    typer.echo("[]" if before == "[" else "\n]")


@app.command()
def stats(terms: Terms = None, store: Store = None, as_json: Json = False) -> None:
    """Count chunks, tokens and bytes, by model, namespace and tag."""
    with looked_into(store) as place:
        counted = catalog.stats(place, chosen(terms))
    if as_json:
        typer.echo(json.dumps(counted.to_dict(), indent=2))
        return
    typer.echo(shown(str(counted.total)))
    _tell_if_none(terms, counted.total.chunks)
    for title in ("models", "namespaces", "tags"):
        groups = getattr(counted, title)
        if groups:
            typer.echo(f"{title}:")
        for name in sorted(groups):
            typer.echo(shown(f"  {name or '(none)'}: {groups[name]}"))


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="A key, or the beginning of its hash.")],
    store: Store = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id: shows the text of the chunk.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one chunk: its metadata, its header, and how large its keys and values are.

    Ends with 1 if there is no such chunk.
    """
    decoder = None
    if tokenizer is not None:
        from chunkcache.model.loading import load_tokenizer

        decoder = load_tokenizer(tokenizer)
    with looked_into(store) as place:
        from chunkcache.inventory.inspection import inspect, read_text

        found = _find(place, key)
        inside = inspect(place, found.key) if found else None
    if found is None or inside is None:
        typer.echo(f"chunkcache: no chunk {key!r} in this store", err=True)
        raise typer.Exit(1)
    if decoder is not None:
        inside = read_text(inside, found, decoder)
    told: dict[str, Any] = {"key": found.key, **(found.metadata or {}), "blob": found.nbytes}
    extras = {ending[1:]: found.extras.get(ending, 0) for ending in EXTRAS}
    told |= {name: nbytes for name, nbytes in extras.items() if nbytes or name in told}
    if as_json:
        typer.echo(json.dumps({**told, **inside.to_dict()}, indent=2))
        return
    for name, value in told.items():
        typer.echo(shown(f"{name}: {value}"))
    if inside.text:
        typer.echo(shown(f"text: {inside.text}"))
    tensors = {name: t for name, t in inside.header.items() if name != "__metadata__"}
    if tensors:
        name, first = next(iter(tensors.items()))
        said = f"header: {len(tensors)} tensors; {name} is {first['dtype']} {first['shape']}"
        typer.echo(shown(said))
    for norms in inside.norms:
        typer.echo(
            f"layer {norms.layer}: mean L2 norm of keys {norms.keys:,.2f}, "
            f"of values {norms.values:,.2f}"
        )
    if inside.unread:
        typer.echo(shown(f"not shown: {inside.unread}"))


def _find(store: ChunkStore, key: str) -> Listed | None:
    """The entry of a key, with or without the ending of a value, or of a hash's beginning.

    Raises:
        SettingError: Several chunks match.
    """
    key = key.rpartition("@")[0] if key.endswith(VALUES) else key
    if not key:
        raise SettingError("show needs a key or the beginning of a hash: ls lists them")
    if "@" in key:
        (fields,), sizes = store.read_metadata([key]), store.sizes(with_extras([key]))
        return Listed(key, fields, *sizes) if fields or any(sizes) else None
    meant = (entry for entry in catalog.entries(store) if _hash(entry.key).startswith(key))
    found = list(islice(meant, 2))
    if len(found) > 1:
        raise SettingError(
            f"{key!r} begins the hash of several chunks, such as {found[0].key} and "
            f"{found[1].key}: give more of the hash, or a whole key"
        )
    return found[0] if found else None


def _hash(key: str) -> str:
    return key.rpartition("@")[2].strip("{}")


@app.command()
def purge(
    terms: Terms = None, store: Store = None, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Delete chunks: blobs, metadata, and their mentions in the index. Needs terms."""
    if not terms:
        raise SettingError("purge needs terms that say which chunks, such as namespace=team-a")
    with looked_into(store) as place:
        done = catalog.delete(place, chosen(terms), dry_run=dry_run)
    typer.echo(json.dumps(asdict(done), indent=2) if as_json else done)
    _tell_if_none(terms, done.chunks)


@app.command()
def sweep(store: Store = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Delete leftovers: chunks without blob or metadata, index entries of chunks that are gone."""
    with looked_into(store) as place:
        done = catalog.sweep(place, dry_run=dry_run)
    typer.echo(json.dumps(asdict(done), indent=2) if as_json else done)


@app.command()
def copy(
    src: Annotated[str, typer.Argument(metavar="SRC", help="URL of the store to copy from.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="URL of the store to copy to.")],
    terms: Terms = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check each blob, and leave damaged ones out.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Copy chunks and their index entries to another store; what it has is not sent again.

    Ends with 1 if chunks were left out: damaged, or gone from SRC meanwhile.
    """
    from chunkcache.inventory.copy import copy_chunks

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        opened(src, refresh_ttl=False) as source,
        opened(dst) as target,
        Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar,
    ):
        if repr(source) == repr(target) and urlsplit(src).query == urlsplit(dst).query:
            raise SettingError("SRC and DST are the same store: name two")
        task = bar.add_task("", total=None)
        done = copy_chunks(
            source, target, chosen(terms), verify=verify, dry_run=dry_run,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    typer.echo(json.dumps(asdict(done), indent=2) if as_json else done)
    for key, why in done.reasons.items():
        typer.echo(shown(f"{key}: {why}"), err=True)
    if done.left_out:
        raise typer.Exit(1)
