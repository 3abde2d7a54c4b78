"""`chunkcache doctor`: is all well, does it pay, and what would a larger load need?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from chunkcache.cli.options import ERR, Json, Store, loaded
from chunkcache.doctor import sizing
from chunkcache.doctor.sizing import Load, Node, Plan
from chunkcache.errors import SettingError
from chunkcache.settings import Settings
from chunkcache.stores import parse_bytes
from chunkcache.tokens.token_text import visible

app = typer.Typer()
_PLAN = "Sizing (--plan)"
_LEAST_MEMORY = 1_000_000  # bytes; less has forgotten its unit


@app.command()
def doctor(
    store: Store = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder or hub id, to be tried as well.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Tell what a load would need instead; asks no store."),
    ] = False,
    corpus_tokens: Annotated[
        float | None, typer.Option(help="Tokens to be kept, such as 50e6.", rich_help_panel=_PLAN)
    ] = None,
    prompts_per_second: Annotated[
        float, typer.Option(help="How many prompts come.", rich_help_panel=_PLAN)
    ] = 1.0,
    prompt_tokens: Annotated[
        float, typer.Option(help="Tokens of a prompt.", rich_help_panel=_PLAN)
    ] = 4000.0,
    reused: Annotated[
        float, typer.Option(help="Share of them that is found, 0 to 1.", rich_help_panel=_PLAN)
    ] = 0.9,
    prefill_rate: Annotated[
        float | None,
        typer.Option(
            help="Tokens/s that the model computes, as doctor --model measures them.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the model. Default: as its config says.", rich_help_panel=_PLAN),
    ] = None,
    node_memory: Annotated[
        str, typer.Option(help="RAM of one server, such as 64GB.", rich_help_panel=_PLAN)
    ] = "64GB",
    node_link: Annotated[
        float, typer.Option(help="Its network, in Gbit/s.", rich_help_panel=_PLAN)
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Try the store, and the model on it: reachable, fast, set up well, and does it pay?

    Writes 32 MiB under keys of its own, reads them back and deletes them; with --model also some
    prompts. Ends with 1 if something should be changed, and with 2 if the store does not work.

    With --plan: what a model, a corpus and a rate of prompts need in memory, network and servers.
    The model's configuration is enough for that.
    """
    if not plan:
        if any(each is not None for each in (corpus_tokens, prefill_rate, dtype)):
            raise SettingError(
                "--corpus-tokens, --prefill-rate and --dtype are about a load: add --plan, or "
                "leave them out"
            )
        _examine(store, model, as_json)
        return
    if model is None or corpus_tokens is None:
        raise SettingError("--plan needs --model and --corpus-tokens: name both")
    load = Load(corpus_tokens, prompts_per_second, prompt_tokens, reused)
    memory = parse_bytes(node_memory)
    if memory < _LEAST_MEMORY:
        raise SettingError(f"--node-memory {node_memory} is too little: write it as in 64GB")
    node = Node(memory, 1e9 * node_link)
    found = _plan(model, dtype, load, node, prefill_rate)
    if as_json:
        told = {"model": model, "load": asdict(load), "node": asdict(node), "nodes": found.nodes}
        typer.echo(json.dumps({**told, **asdict(found)}, indent=2))
    else:
        typer.echo(_shown(model, found, load, node))


def _examine(url: str | None, model: str | None, as_json: bool) -> None:
    from chunkcache.doctor.checks import Health, examine_stores, open_for_measuring

    # Opened first, since a model may take minutes to load.
    with open_for_measuring(url) as store:
        if model is None:
            with ERR.status("starting") as status:
                health = Health(examine_stores(url, status.update))
        else:
            with loaded(model) as (network, _), ERR.status("starting") as status:
                from chunkcache.doctor.trial import examine_model

                health = Health(
                    examine_stores(url, status.update),
                    examine_model(model, network, store, status.update),
                )
    typer.echo(json.dumps(health.to_dict(), indent=2) if as_json else visible(str(health)))
    if not health.good:
        raise typer.Exit(1)


def _plan(model: str, dtype: str | None, load: Load, node: Node, rate: float | None) -> Plan:
    import torch

    from chunkcache.doctor.footprint import chunk_bytes, layout_of
    from chunkcache.model.loading import load_config
    from chunkcache.samples import quiet_transformers

    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and (not isinstance(kind, torch.dtype) or not kind.is_floating_point):
        raise SettingError(f"--dtype {dtype!r} is not known: use float32, bfloat16 or float16")
    settings = Settings.load()
    with quiet_transformers():
        layout = layout_of(load_config(model), kind)
    nbytes = chunk_bytes(layout, settings.chunk_size, settings.codec)
    return sizing.plan(
        nbytes,
        settings.chunk_size,
        load,
        node,
        prefill_rate=rate,
        anywhere=settings.reuse == "anywhere",
    )


def _shown(model: str, plan: Plan, load: Load, node: Node) -> str:
    lines = [
        f"{model}: {plan.token_bytes:,.0f} bytes per token",
        f"memory: {plan.memory / 1e9:,.1f} GB for {load.corpus_tokens:,.0f} tokens",
        f"network: {8 * plan.read / 1e9:,.2f} Gbit/s read and {8 * plan.write / 1e9:,.2f} written, "
        f"at {load.prompts_per_second:g} prompts/s of {load.prompt_tokens:,.0f} tokens, "
        f"{load.reused:.0%} of them found",
        f"servers: {plan.nodes} of {node.memory / 1e9:,.0f} GB and {node.link / 1e9:g} Gbit/s "
        f"({plan.nodes_for_memory} for the memory, {plan.nodes_for_network} for the network)",
    ]
    if plan.compute_seconds is None or plan.break_even_link is None:
        lines.append(
            f"a prompt: {plan.read_seconds:,.2f} s to read what is found; --prefill-rate tells "
            "what that saves (chunkcache doctor --model measures it)"
        )
    else:
        lines.append(
            f"a prompt: {plan.read_seconds:,.2f} s to read what is found, "
            f"{plan.compute_seconds:,.2f} s to compute it"
        )
        lines.append(f"reading pays on links above {plan.break_even_link / 1e9:,.2f} Gbit/s")
    return "\n".join(lines)
