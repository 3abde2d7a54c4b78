"""Which models work, and how: every decoder that Transformers can build from a tiny configuration.

    python -m benchmarks.coverage                 # all of them, about 15 minutes on 2 cores
    python -m benchmarks.coverage llama gemma2    # some, only printed

Each model has random weights. Prompts of 150 tokens are run plainly and through the cache, cold and
then warm on a second copy of the model, which knows of the first only through the store: the same
text again, text that ends otherwise, a left-padded batch, its padding as text, beams, sampling,
prompt lookup, and a prompt in pieces. Tokens must be those of the plain run everywhere, and logits
within rounding. The cache did one of these:

    reused          tokens are right, and the share of the prompt that was not computed is shown
    normal prefill  tokens are right, nothing was reused, and the report says why
    refused         the cache cannot be made for this model, and says why
    WRONG           tokens differ: never to be seen

Writes docs/coverage.md.
"""

from __future__ import annotations

import argparse
import gc
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chunkcache import ChunkCacheError, RedisChunkCache
from chunkcache.stores.base import ChunkStore
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tiny_config, tokens

TABLE = Path(__file__).parents[1] / "docs" / "coverage.md"
MOST_PARAMETERS = 8_000_000
PROMPT, SHARED, CHUNK = 150, 100, 32
REUSED, NORMAL, REFUSED = "reused", "normal prefill", "refused"
WRONG, NOT_RUN = "WRONG", "not run"
# Largest difference of a step's logits, relative to the largest logit, that rounding explains.
ROUNDING = 1e-3
Output = tuple[torch.Tensor, torch.Tensor]
Run = Callable[..., Output]


@dataclass(frozen=True, slots=True)
class Row:
    """One model.

    Attributes:
        model_type: Its name in Transformers.
        prefix: What the default mode does.
        skipped: Share of a prompt that was not computed, of which two thirds were known.
        wrong: The ways of generating that gave other tokens than the plain run.
        anywhere: What `reuse="anywhere"` does.
        why: Reasons.
    """

    model_type: str
    prefix: str
    skipped: float
    wrong: tuple[str, ...]
    anywhere: str
    why: str


def prompt(seed: int, length: int = PROMPT) -> torch.Tensor:
    """`[1, length]`, of which the first `SHARED` are the same for all seeds."""
    return torch.cat([tokens(SHARED, seed=1), tokens(length - SHARED, seed=seed)], 1)


def batch() -> dict[str, torch.Tensor]:
    """Two rows, one of them with 9 columns of left padding."""
    ids = prompt(2).repeat(2, 1)
    ids[0] = torch.cat([torch.zeros(9, dtype=torch.long), prompt(3, PROMPT - 9)[0]])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(inputs: dict[str, torch.Tensor], model: Any, cache: Any, **how: Any) -> Output:
    """Tokens, and logits of each step."""
    torch.manual_seed(5)
    how = {"do_sample": False, "max_new_tokens": 6, "use_cache": True, **how}
    out = model.generate(
        **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **how
    )
    return out.sequences, torch.stack(out.logits)


def ways() -> dict[str, Run]:
    """Ways of generating: each takes a model and a cache, and gives tokens and logits."""
    same, other, twice = ({"input_ids": ids} for ids in (prompt(2), prompt(4), prompt(5)))
    twice["input_ids"] = twice["input_ids"].repeat(1, 2)
    padded = batch()
    as_text = padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}
    return {
        "same text": partial(generate, same),
        "other end": partial(generate, other),
        "batch": partial(generate, padded),
        "padding as text": partial(generate, as_text),
        "beams": partial(generate, other, num_beams=3, num_return_sequences=3),
        "sampling": partial(generate, other, do_sample=True, num_return_sequences=2, top_k=20),
        "lookup": partial(generate, twice, prompt_lookup_num_tokens=3),
        "pieces": partial(generate, other, prefill_chunk_size=64),
    }


def cover(model_type: str) -> Row:
    """Try one model."""
    row = partial(Row, model_type)
    try:
        model, twin = build(model_type), build(model_type)
        with torch.no_grad():
            plain = run_all(model)
    except Exception as error:
        return row(NOT_RUN, 0.0, (), NOT_RUN, short(str(error)))
    if not plain:
        return row(NOT_RUN, 0.0, (), NOT_RUN, "it does not generate from a text alone")
    store = MemoryStore()
    try:
        RedisChunkCache(model, store)
    except ChunkCacheError as error:
        return row(REFUSED, 0.0, (), REFUSED, short(str(error)))
    wrong = []
    share, why = 0.0, ""
    for copy in (model, twin):
        for name, expected in plain.items():
            cache = RedisChunkCache(copy, store, chunk_size=CHUNK, state_every=64)
            found = ways()[name](copy, cache)
            if not is_same(found, expected):
                wrong.append(name)
            cache.flush()
            if name == "other end" and copy is model:
                report = cache.report
                share, why = 1 - report.computed / max(report.prompt_tokens, 1), report.skipped
    verdict = WRONG if wrong else REUSED if share else NORMAL
    anywhere, more = cover_anywhere(model, store)
    reasons = dict.fromkeys(short(text) for text in (why, more) if text)
    return row(verdict, share, tuple(dict.fromkeys(wrong)), anywhere, "; ".join(reasons))


def is_same(mine: Output, its: Output) -> bool:
    """Whether tokens are the same, and logits but for rounding."""
    if not torch.equal(mine[0], its[0]) or mine[1].shape != its[1].shape:
        return False
    seen = its[1].isfinite()
    gap = (mine[1][seen] - its[1][seen]).abs().max()
    return bool(gap <= ROUNDING * its[1][seen].abs().max())


def run_all(model: Any) -> dict[str, Output]:
    """The plain run, in each way that this model can take."""
    results = {}
    for name, way in ways().items():
        try:
            results[name] = way(model, None)
        except Exception:
            if name in ("same text", "other end"):
                raise
    return results


def cover_anywhere(model: Any, store: ChunkStore) -> tuple[str, str]:
    """What `reuse="anywhere"` does with text that stands elsewhere, and why."""
    moved = torch.cat([tokens(21, seed=7), prompt(2)], 1)
    settings = {"reuse": "anywhere", "repair": "full", "chunk_size": CHUNK, "namespace": "moved"}
    again = partial(RedisChunkCache, model, store, **settings)
    try:
        ways()["same text"](model, again())
    except ChunkCacheError as error:
        return REFUSED, str(error)
    cache = again()
    # With everything computed again in place, tokens must be exact here too.
    inputs = {"input_ids": moved}
    if not is_same(generate(inputs, model, cache), generate(inputs, model, None)):
        return WRONG, "anywhere with everything repaired is wrong"
    return (REUSED, "") if cache.report.recomputed else (NORMAL, cache.report.skipped)


def build(model_type: str) -> Any:
    """A tiny model, or an error that says why not."""
    config = tiny_config(model_type)
    if config.is_encoder_decoder:
        raise ValueError("an encoder-decoder")
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"more than {MOST_PARAMETERS:,} parameters in its tiny configuration")
    return tiny(model_type)


def short(text: str) -> str:
    """A reason as one line, without the words that all refusals of `reuse="anywhere"` share."""
    text = re.sub(r"^reuse='anywhere' is not possible with \w+: ", "", " ".join(text.split()))
    text = text.removesuffix(". Use reuse='prefix'")
    return text if len(text) < 140 else text[:137] + "..."


def document(rows: list[Row]) -> str:
    """The page of the docs."""
    run = [row for row in rows if row.prefix != NOT_RUN]
    lines = [
        "# Which models work",
        "",
        "Every decoder that Transformers builds from a tiny configuration, with random weights, "
        "run with and without the cache, cold and warm: greedy decoding, left-padded batches, "
        "beams, sampling, prompt lookup and prompts in pieces. Made by "
        "`python -m benchmarks.coverage` with "
        f"transformers {transformers.__version__} and torch {torch.__version__}.",
        "",
        "- *Reused*: the tokens of a run without the cache, and logits within rounding. *Skipped* "
        "is the share of a prompt that was not computed; 64 % is the most here.",
        "- *Normal prefill*: the same tokens, and nothing is reused ([why](fallbacks.md)).",
        "- *Refused*: making the cache is an error that says why.",
        "",
        f"{len(run)} models were run: "
        + ", ".join(
            f"{sum(row.prefix == kind for row in run)} {kind}"
            for kind in (REUSED, NORMAL, REFUSED, WRONG)
        )
        + f'; `reuse="anywhere"` works on {sum(row.anywhere == REUSED for row in run)}.',
        "",
        '| model type | `reuse="prefix"` | skipped | `reuse="anywhere"` | why |',
        "|---|---|---|---|---|",
    ]
    for row in run:
        prefix = f"{row.prefix} ({', '.join(row.wrong)})" if row.wrong else row.prefix
        share = f"{100 * row.skipped:.0f} %" if row.skipped else ""
        why = row.why.replace("|", "\\|")
        lines.append(f"| {row.model_type} | {prefix} | {share} | {row.anywhere} | {why} |")
    others = ", ".join(row.model_type for row in rows if row.prefix == NOT_RUN)
    lines += [
        "",
        f"Not run, as no tiny configuration of theirs generates from text alone: {others}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, try the models, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="model types; all of them if none is named")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    console, rows = Console(width=150), []
    for name in track(options.models or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "models"):
        rows.append(cover(name))
        gc.collect()
        row = rows[-1]
        console.print(
            f"{row.model_type}: {row.prefix} {100 * row.skipped:.0f} % {', '.join(row.wrong)}; "
            f"anywhere {row.anywhere}; {row.why}",
            highlight=False,
        )
    if not options.models:
        TABLE.write_text(document(rows))
        console.print(f"written to {TABLE}")


if __name__ == "__main__":
    main()
