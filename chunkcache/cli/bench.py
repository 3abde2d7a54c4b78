"""`chunkcache bench`: how much sooner the first token comes, with one's own model and store."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from chunkcache.cli.options import ERR, Json, Model, Store

app = typer.Typer()


@app.command()
def bench(
    model: Model,
    store: Store = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length of the document; may be given several times."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    as_json: Json = False,
) -> None:
    """Measure the first token and each later one: without a cache, cold, and warm.

    Without --tokens: documents of 512 and 2,000 tokens. What was stored for it is deleted
    afterwards. Ends with 1 if the cache changed an answer.
    """
    with ERR.status("starting") as status:
        from chunkcache.cli.demo import ready_store
        from chunkcache.doctor.bench import run_bench
        from chunkcache.samples import quiet_transformers

        # The store first: it is asked in a moment, and a model may take minutes to load.
        place = ready_store(store)
        with quiet_transformers():
            told = run_bench(
                model, place, tokens or (512, 2000), repeats, max_new_tokens, status.update
            )
    if as_json:
        typer.echo(json.dumps(told.to_dict(), indent=2))
    else:
        Console().print(told.table())
    for length in told.without_reuse:
        typer.echo(
            f"--tokens {length}: nothing was reused, so this measures no gain; the prompt is "
            "shorter than a chunk, reading has been slower than computing (min_gain), or the store "
            "is full or read-only",
            err=True,
        )
    if not told.same:
        raise typer.Exit(1)
