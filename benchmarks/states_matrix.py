"""Hybrid models: every family, every way to generate, every state of the store. Wrong tokens: none.

    python -m benchmarks.states_matrix                      # about 40 minutes on one core
    python -m benchmarks.states_matrix zaya --sessions 20   # some families, only printed

Tiny random models in float32: tokens must be those of a run without the cache. `session` is a
random series of prompts that go on, are edited, or begin anew, in cache objects kept or made anew.
In bfloat16 tokens may differ where the plain run's first two logits are within rounding.

Writes `states_matrix.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from benchmarks.quality import write
from chunkcache import RedisChunkCache, open_store
from chunkcache.stores.base import STATE, ChunkStore, Entry
from tests.models import tiny, tokens
from tests.prompts import joined, padded
from tests.scripted import blobs

RESULTS = Path(__file__).parent / "results"
FAMILIES = (
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear",
    "bailing_hybrid", "falcon_h1", "granitemoehybrid", "nemotron_h", "bamba", "zamba2", "zaya",
    "lfm2", "lfm2_moe", "lfm3", "inkling_text", "inkling2_text",
    "deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2",
)  # fmt: skip
TEXT, ENDING, OTHER = tokens(150, seed=1), tokens(45, seed=2), tokens(60, seed=3)
PROMPT = joined(TEXT, ENDING)
BATCH = padded(tokens(110, seed=9), PROMPT, joined(TEXT, OTHER)[:, :170], tokens(2, seed=8))
del BATCH["position_ids"]
REPEATED = joined(TEXT[:, :80], TEXT[:, :80], TEXT[:, :20])
HARMS = ("all gone", "half gone", "K/V gone", "damaged", "truncated", "of another chunk")
SETTINGS = {"chunk_size": 32, "state_every": 64}
ROUNDING = 4e-2  # of the largest logit, in bfloat16
Mode = Callable[[Any, Callable[..., Any]], list[Any]]
Row = tuple[int, int, int]
_reused = [0]


def answer(model: Any, prompt: Any, cache: Any, **how: Any) -> Any:
    """What `generate` gives for ids `[1, tokens]` or a batch; the cache may be None."""
    torch.manual_seed(7)
    given = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    given = {"attention_mask": torch.ones_like(given["input_ids"]), **given}
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, **how}
    out = model.generate(
        **given, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **how
    )
    out.past_key_values = None  # which would take memory
    if cache is not None:
        cache.flush()
        _reused[0] += cache.report.reused
    return out


def once(prompt: Any, model: Any, make: Any, **how: Any) -> list[Any]:
    return [answer(model, prompt, make(), **how)]


def turns(model: Any, make: Any) -> list[Any]:
    outs, cache = [answer(model, PROMPT, cache := make())], cache
    for seed in range(3):
        outs.append(answer(model, joined(outs[-1].sequences, tokens(40, seed=seed)), cache))
    return outs


def edited(model: Any, make: Any) -> list[Any]:
    cache = make()
    told = answer(model, PROMPT, cache)
    others = joined(told.sequences[:, :-4], ENDING), joined(PROMPT[:, :140], OTHER), OTHER, PROMPT
    return [told, *(answer(model, ids, cache) for ids in others)]


def crop(model: Any, make: Any) -> list[Any]:
    """Taken back by hand where the model's layers allow it; a prompt then goes on from there."""
    cache = make()
    told = answer(model, PROMPT, cache)
    if cache is not None:
        try:
            cache.crop(-30)
        except Exception:
            cache.reset()
    return [told, answer(model, joined(told.sequences[:, :171], OTHER), cache)]


def session(seed: int, model: Any, make: Any) -> list[Any]:
    source, outs = Random(seed), []
    settings = {
        "chunk_size": source.choice([16, 32, 48, 64, 100]),
        "state_every": source.choice([0, 64, 128]),
        "piece_tokens": source.choice([0, 0, 70]),
    }
    caches, texts = [make(**settings), make(**settings)], [tokens(200, seed=seed)]
    for _ in range(7):
        old = source.choice(texts)
        more = tokens(source.choice([1, 2, 9, 50, 120]), seed=source.randrange(99))
        ids = joined(old[:, : source.choice([63, 64, 65, 128, 130, 200, 500])], more)[:, -440:]
        at, rows = source.randrange(2), source.choice([1, 1, 1, 2])
        if source.random() < 0.4:
            caches[at] = make(**settings)
        prompt = padded(ids, source.choice(texts)) if rows == 2 else {"input_ids": ids}
        prompt.pop("position_ids", None)
        how = source.choice([{}, {}, {"num_beams": 2}, {"prefill_chunk_size": 50}])
        how = how | {"max_new_tokens": source.choice([1, 2, 5, 30])}
        outs.append(answer(model, prompt, caches[at], **how))
        if rows == 1:
            texts.append(outs[-1].sequences[:1, :440])
    return outs


def modes(sessions: int) -> dict[str, Mode]:
    return {
        "greedy": partial(once, PROMPT),
        "sample": partial(once, PROMPT, do_sample=True),
        "beams": partial(once, PROMPT, num_beams=3),
        "returns": partial(once, PROMPT, do_sample=True, num_return_sequences=2),
        "batch": partial(once, BATCH),
        "padded beams": partial(once, BATCH, num_beams=2),
        "prefill chunks": partial(once, PROMPT, prefill_chunk_size=90),
        "turns": turns,
        "edited": edited,
        "crop": crop,
        "lookup": partial(once, REPEATED, prompt_lookup_num_tokens=4),
        "assisted": lambda model, make: once(PROMPT, model, make, assistant_model=tiny("llama")),
        **{f"session {seed}": partial(session, seed) for seed in range(sessions)},
    }


def harm(store: ChunkStore, how: str, source: Random) -> None:
    """Do something to a random half of the values of a kind, one at least."""
    keys = [entry.key for page in store.scan("safetensors") for entry in page]
    kind = "" if how.startswith("K/V") else STATE
    keys = [key + kind for key in keys if store.sizes([key + kind])[0]]
    chosen = keys if how.startswith("all") else source.sample(keys, (len(keys) + 1) // 2)
    if how.endswith("gone"):
        store.delete(chosen)
        return
    entries = []
    for key in chosen:
        blob = bytearray(blobs(store, key)[0] or b"")
        match how:
            case "damaged":
                blob[source.randrange(len(blob))] ^= 1
            case "truncated":
                del blob[-4:]
            case _:
                blob = bytearray(blobs(store, source.choice(keys))[0] or b"")
        entries.append(Entry(key, {}, memoryview(blob), merge=True))
    store.write(entries)
    store.flush()


def is_same(mine: Any, its: Any, half: bool) -> bool:
    """Whether tokens are the same; in half precision, but for rounding."""
    if torch.equal(mine.sequences, its.sequences) or not half:
        return torch.equal(mine.sequences, its.sequences)
    bound = 2 * ROUNDING * max(float(x[x.isfinite()].abs().max()) for x in its.logits)
    if getattr(its, "sequences_scores", None) is not None:
        return bool((mine.sequences_scores - its.sequences_scores).abs().max() <= bound)
    first = int((mine.sequences != its.sequences).any(0).nonzero()[0])
    top = its.logits[first - its.sequences.shape[1]][0].topk(2).values
    return bool(top[0] - top[1] <= bound)


def count(model: Any, run: Mode, store: ChunkStore, plain: list[Any], half: bool) -> Row:
    """Answers, wrong ones, and tokens reused, of a run behind a store."""
    before = _reused[0]
    mine = run(model, lambda **more: RedisChunkCache(model, store, **(SETTINGS | more)))
    bad = sum(not is_same(a, b, half) for a, b in zip(mine, plain, strict=True))
    return len(mine), bad, _reused[0] - before


def measure(family: str, mode: str, run: Mode, folder: Path, half: bool) -> Iterator[Any]:
    """Each state of the store, and what `count` says of it."""
    model = tiny(family, dtype=torch.bfloat16 if half else torch.float32)
    try:
        plain = run(model, lambda **_: None)
    except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        print(f"{family}: Transformers has no {mode} here ({str(error)[:80]})")
        return
    for number, state in enumerate(("cold", "warm", *HARMS)):
        where = folder / "store"
        if number > 1:
            where = folder / state.replace("/", "")
            shutil.copytree(folder / "store", where)
        with open_store(where.as_uri()) as store:
            if number > 1:
                harm(store, state, Random(mode))
            yield state, count(model, run, store, plain, half)
    (folder / "plain.json").write_text(json.dumps([out.sequences.tolist() for out in plain]))


def behind(family: str, folder: Path, sessions: int) -> Iterator[Any]:
    """The same for the store as it was left, in this process, which has not seen it before."""
    model = tiny(family)
    for mode, run in modes(sessions).items():
        file = folder / mode / "plain.json"
        if file.exists():
            with open_store((folder / mode / "store").as_uri()) as store:
                answers = json.loads(file.read_text())
                plain = [SimpleNamespace(sequences=torch.tensor(each)) for each in answers]
                yield mode, count(model, run, store, plain, half=False)


def cover(family: str, sessions: int) -> Iterator[dict[str, Any]]:
    """A row of the table for each state of the store, and one for bfloat16."""
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, list[Row]] = {}
        for mode, run in modes(sessions).items():
            for half in (False, True)[: 1 + (mode in ("greedy", "beams"))]:
                place = Path(name, mode + " in bfloat16" * half)
                for state, row in measure(family, mode, run, place, half):
                    found.setdefault("bfloat16" if half else state, []).append(row)
                    if row[1]:
                        print(f"WRONG: {family}, {mode}, {state}, half={half}: {row}", flush=True)
        command = [sys.executable, "-m", "benchmarks.states_matrix", family, "--behind", name]
        done = subprocess.run(
            [*command, "--sessions", str(sessions)], stdout=subprocess.PIPE, text=True, check=True
        )
        for mode, row in json.loads(done.stdout.splitlines()[-1]):
            found.setdefault("other process", []).append(row)
            if row[1]:
                print(f"WRONG: {family}, {mode}, other process: {row}", flush=True)
    for state, rows in found.items():
        answers, bad, reused = (sum(each) for each in zip(*rows, strict=True))
        yield {
            "family": family, "store": state, "answers": answers, "wrong": bad, "reused": reused
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="all of them if none is named")
    parser.add_argument("--sessions", type=int, default=3, help="random series of prompts")
    parser.add_argument("--behind", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.behind:
        print(json.dumps([*behind(options.families[0], options.behind, options.sessions)]))
        return
    rows = []
    for family in options.families or FAMILIES:
        for row in cover(family, options.sessions):
            print(*row.values(), flush=True)
            rows.append(row)
    print(f"{sum(row['answers'] for row in rows)} answers, {sum(r['wrong'] for r in rows)} wrong")
    if not options.families:
        write(rows, RESULTS / "states_matrix.csv")


if __name__ == "__main__":
    main()
