"""What several commands of the command line have in common: options, and a store that is open."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from chunkcache.inventory.filters import Filter
from chunkcache.settings import Settings
from chunkcache.stores import ChunkStore, open_store

ERR = Console(file=sys.stderr)

Store = Annotated[
    str | None,
    typer.Option("--store", help="URL. Default: CHUNKCACHE_URL, else the embedded store."),
]
Terms = Annotated[
    list[str] | None,
    typer.Argument(
        help="Which chunks: namespace=team-a tags=project=docs 'age>7d' temperature=0.7"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Model = Annotated[str, typer.Option("--model", help="A model's folder or hub id.")]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", help="As in the setting. Default: CHUNKCACHE_NAMESPACE."),
]


def opened(url: str | None, **settings: Any) -> ChunkStore:
    """The store, with the settings in force but these. Before any work, for these may be wrong."""
    return open_store(url, **Settings.load(**settings).of_store)


@contextmanager
def looked_into(url: str | None) -> Iterator[ChunkStore]:
    """The store, and a sign of life on stderr. Looking renews no time to live. Loads no model."""
    with opened(url, refresh_ttl=False) as store, ERR.status("looking through the store"):
        yield store


@contextmanager
def loaded(model: str) -> Iterator[tuple[Any, Any]]:
    """Model and tokenizer. Settings and store come before: a model may take minutes to load."""
    with ERR.status("loading the model"):
        from chunkcache.model.loading import load_model
        from chunkcache.samples import quiet_transformers

        with quiet_transformers():
            pair = load_model(model)
    with quiet_transformers():
        yield pair


def chosen(terms: list[str] | None) -> Filter:
    """The filter that these terms make; without terms, all chunks."""
    return Filter.parse(shlex.join(terms)) if terms else Filter()


def given(**settings: Any) -> dict[str, Any]:
    """Those settings that were given; the others come from the environment."""
    return {name: value for name, value in settings.items() if value is not None}
