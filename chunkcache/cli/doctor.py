"""`chunkcache doctor`: is all well, and does it pay?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from chunkcache.cli.options import ERR, Json, Store, loaded
from chunkcache.tokens.token_text import visible

app = typer.Typer()


@app.command()
def doctor(
    store: Store = None,
    model: Annotated[
        str | None, typer.Option(help="Test this model too: a folder or hub id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the store and, with --model, whether reading K/V from it is faster than computing.

    Writes 32 MiB under keys of its own, reads them back and deletes them; with --model also some
    prompts. Ends with 1 if something should be changed, and with 2 if the store does not work.
    """
    from chunkcache.doctor.checks import Health, examine_stores, open_for_measuring

    # Opened first, since a model may take minutes to load.
    with open_for_measuring(store) as opened:
        if model is None:
            with ERR.status("starting") as status:
                health = Health(examine_stores(store, status.update))
        else:
            with loaded(model) as (network, _), ERR.status("starting") as status:
                from chunkcache.doctor.trial import examine_model

                health = Health(
                    examine_stores(store, status.update),
                    examine_model(model, network, opened, status.update),
                )
    typer.echo(json.dumps(health.to_dict(), indent=2) if as_json else visible(str(health)))
    if not health.good:
        raise typer.Exit(1)
