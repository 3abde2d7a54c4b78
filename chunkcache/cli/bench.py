"""`chunkcache bench`: how much sooner the first token comes, with one's own model and store."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from chunkcache.cli.options import ERR, Json, Store, loaded, opened
from chunkcache.errors import SettingError
from chunkcache.settings import Settings
from chunkcache.stores import named_urls
from chunkcache.stores.address import without_password

app = typer.Typer()
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"model": None, "tokens": (512, 2000), "repeats": 3},
    "demo": {"model": "SmolLM2-135M-Instruct", "tokens": (2000,), "repeats": 1},
}


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Option("--model", help="A model's folder or hub id.")
    ] = None,
    store: Store = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Length of the document; may be given several times. Default: 512 and 2000.",
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="How often each is measured. Default: 3.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    preset: Annotated[
        str | None,
        typer.Option(help="demo: the sample model, --tokens 2000 --repeats 1, unless given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the first token and each later one: without a cache, cold, and warm.

    What was stored for it is deleted afterwards. Ends with 1 if the cache changed an answer.
    """
    if preset not in PRESETS:
        raise SettingError(f"--preset {preset!r} is not known: use demo, or leave it out")
    usual = PRESETS[preset]
    name = model or usual["model"]
    if name is None:
        raise SettingError("bench needs --model, a model's folder or hub id; or use --preset demo")
    settings = Settings.load()
    if not settings.write or settings.reuse == "off":
        raise SettingError(
            "write=False or reuse='off' (CHUNKCACHE_WRITE, CHUNKCACHE_REUSE): nothing could be "
            "reused, and this is about how much that gains; leave them out"
        )
    repeats = repeats or usual["repeats"]
    with opened(store) as place:
        # The store first: it is asked in a moment, and a model may take minutes to load.
        place.sizes(["chunkcache@bench"])
        with loaded(name) as pair, ERR.status("starting") as status:
            from chunkcache.doctor.bench import Bench, Bencher

            bencher = Bencher(*pair, place, repeats, max_new_tokens, status.update)
            arms = bencher.run(tokens or usual["tokens"])
    where = " ".join(map(without_password, named_urls(store))) or "embedded://"
    told = Bench(name, where, repeats, arms)
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
