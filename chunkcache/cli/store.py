"""`chunkcache ls | stats | show | purge | sweep`: what is in a store, by its metadata alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chunkcache.cli.errors import errors_in_one_line
from chunkcache.cli.options import DryRun, Json, Store, Terms, chosen, opened

if TYPE_CHECKING:
    from chunkcache.stores.base import ChunkStore, Listed

app = typer.Typer()
_COLUMNS = ("model", "namespace", "tags", "positions", "codec", "created")


@app.command()
def ls(
    terms: Terms = None,
    store: Store = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 50,
    as_json: Json = False,
) -> None:
    """List chunks, in no order: the hash's beginning, which `show` takes, and what they are."""
    with opened(store) as place:
        from chunkcache.inventory import catalog

        found = list(islice(catalog.entries(place, chosen(terms)), limit or None))
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in found], indent=2))
        return
    view = Table(box=None)
    for column in ("hash", *_COLUMNS, "MB"):
        view.add_column(column, overflow="fold", justify="right" if column == "MB" else "left")
    for entry in found:
        fields = {"created": "", **(entry.metadata or {})}
        fields["created"] = fields["created"][:16].replace("T", " ")
        cells = (escape(fields.get(column, "")) for column in _COLUMNS)
        view.add_row(_hash(entry.key)[:12], *cells, f"{entry.nbytes / 1e6:.2f}")
    Console().print(view)
    if limit and len(found) == limit:
        typer.echo(f"the first {limit}; --limit 0 lists all", err=True)


@app.command()
def stats(terms: Terms = None, store: Store = None, as_json: Json = False) -> None:
    """Count chunks, tokens and bytes, by model, namespace and tag."""
    with opened(store) as place:
        from chunkcache.inventory import catalog

        counted = catalog.stats(place, chosen(terms))
    typer.echo(json.dumps(counted.to_dict(), indent=2) if as_json else counted)


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
    with opened(store) as place:
        from chunkcache.inventory.inspection import inspect

        found = _find(place, key)
        inside = inspect(place, found.key) if found else None
    if found is None or inside is None:
        typer.echo(f"chunkcache: no chunk {key!r} in this store", err=True)
        raise typer.Exit(1)
    told: dict[str, Any] = {"key": found.key, **(found.metadata or {}), "blob": found.nbytes}
    if tokenizer and "token_ids" in told:
        with errors_in_one_line():
            from chunkcache.model.loading import load_tokenizer

            told["text"] = load_tokenizer(tokenizer).decode(json.loads(told["token_ids"]))
    if as_json:
        typer.echo(json.dumps({**told, **asdict(inside)}, indent=2))
        return
    for name, value in told.items():
        typer.echo(f"{name}: {value}")
    tensors = {name: t for name, t in inside.header.items() if name != "__metadata__"}
    if tensors:
        name, first = next(iter(tensors.items()))
        typer.echo(f"header: {len(tensors)} tensors; {name} is {first['dtype']} {first['shape']}")
    for norms in inside.norms:
        typer.echo(
            f"layer {norms.layer}: a token's key is {norms.keys:,.2f} long in each head, "
            f"its value {norms.values:,.2f}"
        )
    if inside.unread:
        typer.echo(f"not shown: {inside.unread}")


def _find(store: ChunkStore, key: str) -> Listed | None:
    """The entry of a key, with or without the ending of one half, or of a hash's beginning."""
    from chunkcache.inventory import catalog
    from chunkcache.stores.base import KV_BYTES, METADATA, Listed

    key = key.removesuffix(METADATA).removesuffix(KV_BYTES)
    if "@" in key:
        (fields,), (size,) = store.read_metadata([key]), store.sizes([key])
        return Listed(key, fields, size) if fields or size else None
    found = (entry for entry in catalog.entries(store) if _hash(entry.key).startswith(key))
    return next(found, None)


def _hash(key: str) -> str:
    return key.rpartition("@")[2].strip("{}")


@app.command()
def purge(
    terms: Terms = None, store: Store = None, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Delete chunks: blobs, metadata, and their mentions in the index. Needs terms."""
    with opened(store) as place:
        from chunkcache.errors import SettingError
        from chunkcache.inventory import catalog

        if not terms:
            raise SettingError("purge needs terms that say which chunks, such as namespace=team-a")
        done = catalog.delete(place, chosen(terms), dry_run=dry_run)
    typer.echo(json.dumps(asdict(done), indent=2) if as_json else done)


@app.command()
def sweep(store: Store = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Delete what is of no use: halves of chunks, and index entries that name what is gone."""
    with opened(store) as place:
        from chunkcache.inventory import catalog

        done = catalog.sweep(place, dry_run=dry_run)
    typer.echo(json.dumps(asdict(done), indent=2) if as_json else done)
