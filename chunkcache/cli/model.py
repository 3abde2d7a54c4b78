"""`chunkcache explain | warm`: what a store has of a prompt, and documents put into it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from chunkcache.cli.options import ERR, Json, Model, Namespace, Store, given, loaded, opened
from chunkcache.errors import SettingError
from chunkcache.library.corpora import Files, read_dataset
from chunkcache.tokens.token_text import shown

app = typer.Typer()


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="A text file, or - for stdin.")],
    model: Model,
    store: Store = None,
    namespace: Namespace = None,
    reuse: Annotated[
        str | None, typer.Option(help="prefix or anywhere, as in the setting.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the model's chat template.")
    ] = False,
    elsewhere: Annotated[
        bool,
        typer.Option(
            help="Say who else has the text: other models, namespaces. Lists the whole store."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Show which chunks of a prompt would be reused, and why the others not. Runs no model.

    Other settings come from the environment, such as CHUNKCACHE_CHUNK_SIZE. Ends with 1 if nothing
    would be found.
    """
    text = _read(prompt)
    settings = given(namespace=namespace, reuse=reuse)
    with (
        opened(store, **settings) as place,
        loaded(model) as (network, tokenizer),
        ERR.status("asking the store"),
    ):
        from chunkcache import RedisChunkCache

        ids = _tokenize(tokenizer, text, chat)
        with RedisChunkCache(network, place, on_error="raise", **settings) as cache:
            told = cache.explain(ids, tokenizer=tokenizer, elsewhere=elsewhere)
    typer.echo(json.dumps(told.to_dict(), indent=2) if as_json else told)
    if not told.reused + told.moved:
        raise typer.Exit(1)


@app.command()
def warm(
    model: Model,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, a document each, or JSON lines (.jsonl)."),
    ] = None,
    store: Store = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A data set instead: a folder or a hub id. Needs the package datasets."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    prefix: Annotated[
        str | None, typer.Option(help="Text before every document. Default: the BOS token.")
    ] = None,
    filler: Annotated[
        str | None, typer.Option(help="A text like the documents, between prefix and document.")
    ] = None,
    tags: Annotated[
        str | None, typer.Option(help="Tags for the metadata, such as project=docs.")
    ] = None,
    namespace: Namespace = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that go through the model at once.")
    ] = 4096,
    as_json: Json = False,
) -> None:
    """Compute documents ahead of time, so that prompts with --reuse anywhere find them.

    What the store has already is skipped: a run that was stopped can be started again. Other
    settings come from the environment, such as CHUNKCACHE_CHUNK_SIZE. Ends with 1 if a document
    could not be added, and with 2 if the run stopped before the last one.
    """
    documents = _documents(files, dataset, split, field)
    settings = given(namespace=namespace, tags=tags)
    with opened(store, **settings) as place, loaded(model) as (network, tokenizer):
        from chunkcache import add_documents

        summary = add_documents(
            network,
            place,
            documents,
            tokenizer=tokenizer,
            prefix=prefix,
            filler=filler,
            batch_tokens=batch_tokens,
            progress=ERR.is_terminal,
            **settings,
        )
        place.flush()
    typer.echo(json.dumps(asdict(summary), indent=2) if as_json else shown(str(summary)))
    for failure in summary.failures:
        typer.echo(shown(f"document {failure.document}: {failure.reason}"), err=True)
    if summary.stopped or summary.failures:
        raise typer.Exit(2 if summary.stopped else 1)


def _documents(files: list[Path] | None, dataset: str | None, split: str, field: str) -> Any:
    if bool(files) == (dataset is not None):
        raise SettingError("warm needs files or --dataset, one of them: name what to compute")
    if dataset is not None:
        return read_dataset(dataset, split, field)
    return Files(files or (), field)


def _read(prompt: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if prompt == "-" else Path(prompt).read_bytes()
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"prompt {prompt!r} cannot be read: {error}. Name a UTF-8 text file, or - for stdin"
        ) from None
    if not text:
        raise SettingError(f"prompt {prompt!r} is empty: put the prompt's text into it")
    return text


def _tokenize(tokenizer: Any, text: str, chat: bool) -> Any:
    from chunkcache.tokens.texts import chat_inputs

    if not chat:
        return tokenizer(text, verbose=False)["input_ids"]
    if not tokenizer.chat_template:
        raise SettingError("--chat: this model has no chat template; leave it out")
    return chat_inputs(tokenizer, text)["input_ids"]
