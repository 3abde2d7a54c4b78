"""What sees a changed model: its identity, or the check token (a reused token computed once more).

    python -m benchmarks.check_token            # about 10 minutes on 2 cores
    python -m benchmarks.check_token --quick    # one data type, fewer prompts

SmolLM2 stores a text, is then changed in one way, and meets the text again with another ending.
For each change and data type: would the answer have been another; at which prompt does the identity
differ; by how much do the check token's K/V differ from those stored, with an identity that sees
nothing. "rounding" is the largest such difference over many prompts of the unchanged model.
Then what the check token costs: the time to the first token with and without it, in turns.

Prints tables and writes `check_token.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from chunkcache import RedisChunkCache
from chunkcache.model.identity import ModelIdentity
from chunkcache.model.state import ModelState
from chunkcache.reuse.check_token import ROUNDING, CheckToken
from chunkcache.reuse.prefill import Prefill
from chunkcache.samples import document, load_smollm2
from chunkcache.stores.memory import MemoryStore
from tests.servers import Server, redis_binary

RESULTS = Path(__file__).parent / "results"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, ANSWER = 260, 6


@contextmanager
def scaled(weight: torch.Tensor, factor: float) -> Iterator[None]:
    """A part of a weight multiplied, through `.data`, which no version counter shows."""
    before = weight.data.clone()
    weight.data.mul_(factor)
    yield
    weight.data.copy_(before)


@contextmanager
def sharper_attention_function() -> Iterator[None]:
    def sharper(module, query, *rest, **options):
        return sdpa_attention_forward(module, query * 1.1, *rest, **options)

    AttentionInterface.register("sdpa", sharper)
    yield
    AttentionInterface.register("sdpa", sdpa_attention_forward)


def changes(model, ids) -> dict[str, Callable[[], Any]]:
    """What is done to the model, each undone again."""
    layers = model.model.layers
    first, middle, last = layers[0], layers[15], layers[-2]
    mlp = modeling_llama.LlamaMLP.forward
    rotate = modeling_llama.apply_rotary_pos_emb
    met, rare = int(ids[0, 100]), int(ids.max()) - 1
    embedding = model.model.embed_tokens.weight
    return {
        "attention scaling + 10 %, layer 1": lambda: patch.object(
            first.self_attn, "scaling", first.self_attn.scaling * 1.1
        ),
        "attention scaling + 10 %, layer 29": lambda: patch.object(
            last.self_attn, "scaling", last.self_attn.scaling * 1.1
        ),
        "SiLU -> GELU, layer 16": lambda: patch.dict(middle.mlp._modules, act_fn=torch.nn.GELU()),
        "norm's epsilon 1e-5 -> 1e-3, layer 1": lambda: patch.object(
            first.input_layernorm, "variance_epsilon", 1e-3
        ),
        "factor of RoPE 1 -> 0.99": lambda: patch.object(
            model.model.rotary_emb, "attention_scaling", 0.99
        ),
        "class LlamaMLP patched": lambda: patch.object(
            modeling_llama.LlamaMLP, "forward", lambda self, x: 0.9 * mlp(self, x)
        ),
        "function apply_rotary_pos_emb patched": lambda: patch.object(
            modeling_llama,
            "apply_rotary_pos_emb",
            lambda q, k, *rest, **more: rotate(q * 1.1, k, *rest, **more),
        ),
        "attention function registered again": sharper_attention_function,
        "one head of layer 16 off, by .data": lambda: scaled(
            middle.self_attn.o_proj.weight[:, 64:128], 0.0
        ),
        "one row of down_proj x 5, by .data": lambda: scaled(first.mlp.down_proj.weight[7], 5.0),
        "embedding of a token of the text": lambda: scaled(embedding[met], 3.0),
        "embedding of a token elsewhere": lambda: scaled(embedding[rare], 3.0),
    }


def generate(model, ids, cache=None, new=ANSWER):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)


@contextmanager
def watched(found: list[float]) -> Iterator[None]:
    """Collect what the check token measures."""
    difference = CheckToken.difference

    def collecting(self):
        found.append(difference(self))
        return found[-1]

    with patch.object(CheckToken, "difference", collecting):
        yield


@contextmanager
def blind(identity: ModelIdentity) -> Iterator[None]:
    """An identity that sees no change."""
    with patch.object(ModelState, "identity", lambda self: identity):
        yield


def prompts_until(model, said: Callable[[ModelIdentity], bool]) -> str:
    """At which of the next prompts the identity says so: of large tensors each looks at a part."""
    for prompt in ("1st", "2nd", "3rd", "4th"):
        if said(ModelState.of(model).identity()):
            return prompt
    return "-"


def power(dtype: torch.dtype, prompts: int) -> Iterator[dict[str, Any]]:
    """A row for rounding, and one for each change."""
    model, tokenizer = load_smollm2(dtype)
    texts = [
        tokenizer(document(TOKENS + 40, tokenizer, seed), return_tensors="pt").input_ids
        for seed in range(prompts)
    ]
    found: list[float] = []
    with watched(found):
        for ids in texts:
            store = MemoryStore()
            generate(model, ids[:, :TOKENS], RedisChunkCache(model, store, chunk_size=32), new=1)
            for shared in (40, 150, TOKENS - 1):
                again = torch.cat([ids[:, :shared], ids[:, -7:]], 1)
                generate(model, again, RedisChunkCache(model, store, write=False), new=1)
                generate(
                    model, again, RedisChunkCache(model, store, chunk_size=32, write=False), new=1
                )
    name = str(dtype).removeprefix("torch.")
    yield {
        "dtype": name, "change": f"none: rounding in {len(found)} prompts",
        "difference": max(found), "bound": ROUNDING[dtype],
    }  # fmt: skip
    ids = texts[0]
    known, longer = ids[:, :TOKENS], torch.cat([ids[:, :TOKENS], ids[:, -7:]], 1)
    plain = generate(model, longer)
    identity = ModelState.of(model).identity()
    for change, make in changes(model, known).items():
        store = MemoryStore()
        with blind(identity):
            generate(model, known, RedisChunkCache(model, store), new=1)
        with make():
            row = {"dtype": name, "change": change, "bound": ROUNDING[dtype]}
            row["answer"] = "other" if not torch.equal(generate(model, longer), plain) else "same"
            row["identity"] = prompts_until(model, lambda now: now != identity)
            found.clear()
            ModelState.of(model).distrust.clear()
            with blind(identity), watched(found):
                generate(model, longer, RedisChunkCache(model, store, write=False), new=1)
            row["difference"] = max(found)
            row["check token"] = "seen" if max(found) > ROUNDING[dtype] else "-"
        ModelState.of(model).distrust.clear()
        assert prompts_until(model, lambda now: now == identity) != "-", change
        yield row


def cost(rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds to the first token with and without the check token, 2,048 tokens known."""
    model, tokenizer = load_smollm2()
    ids = tokenizer(document(2100, tokenizer, 1), return_tensors="pt").input_ids[:, :2064]
    state, identity = ModelState.of(model), []
    with Server(redis_binary()) as server:
        generate(model, ids[:, :2048], cache := RedisChunkCache(model, server.unix_url), new=1)
        cache.flush()
        times: dict[str, list[float]] = {"with": [], "without": []}
        for turn in range(2 * rounds + 4):
            arm = "with" if turn % 2 else "without"
            shown = Prefill._checked_rows if arm == "with" else lambda self, known: []
            with patch.object(Prefill, "_checked_rows", shown):
                begin = time.perf_counter()
                cache = RedisChunkCache(model, server.unix_url, write=False)
                generate(model, ids, cache, new=1)
                spent = 1e3 * (time.perf_counter() - begin)
            assert cache.report.reused == 2048, cache.report
            begin = time.perf_counter()
            state.identity()
            identity.append(1e3 * (time.perf_counter() - begin))
            if turn >= 4:
                times[arm].append(spent)
    for arm, spent in times.items():
        yield {
            "change": f"first token {arm} check token, ms",
            "difference": statistics.median(spent),
        }
    yield {"change": "of that the identity, ms", "difference": statistics.median(identity)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one data type, fewer prompts")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    columns = ["dtype", "change", "answer", "identity", "check token", "difference", "bound"]
    rows: list[dict[str, Any]] = []
    arms = [power(dtype, 1 if quick else 4) for dtype in DTYPES[: 1 if quick else None]]
    for row in chain(*arms, cost(5 if quick else 25)):
        print(row, flush=True)
        rows.append(row)
    table = Table(*columns)
    for row in rows:
        shown = {k: f"{v:.2g}" if k in ("difference", "bound") else v for k, v in row.items()}
        if "ms" in row["change"]:
            shown["difference"] = f"{row['difference']:.1f}"
        table.add_row(*(str(shown.get(column, "")) for column in columns))
    Console(width=140).print(table)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "check_token.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
