"""EleutherAI's lm-eval with and without the cache: the same scores, less prefill.

    pip install lm_eval
    python -m benchmarks.harness              # 100 questions, about 5 minutes on 2 cores
    python -m benchmarks.harness --limit 10
    python -m benchmarks.harness --choices    # log-likelihoods of four answers instead; 15 minutes

A generation task made of a fact book: 12 solved examples (about 900 tokens), then a question about
another country. The harness passes no cache of its own and needs no change: `enabled()` covers the
model's `generate` while it runs. Prints both scores, their times, and the tokens not computed.

With `--choices`, each question has four answers whose log-likelihoods are compared, by lm-eval's
`HFLM` and by `ChunkCacheLM`: behind the same examples, and without any (zero-shot), where only the
four answers share the question and its text of up to 300 tokens. Each begins with an empty store.
Writes `results/harness.csv`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import uuid
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

import chunkcache
from benchmarks.corpus import Document, documents
from benchmarks.quality import write
from chunkcache.samples import load_smollm2

SHOTS = 12
RESULTS = Path(__file__).parent / "results"


def task(folder: Path, tokenizer: Any, limit: int, shots: int = SHOTS) -> dict[str, Any]:
    """The task's configuration, its data written to a folder. Without examples, texts are whole."""
    found = [document for document in documents("country", "test", tokenizer) if document.fact]
    examples, questions = found[:SHOTS], found[SHOTS : SHOTS + limit]
    files = {"train": folder / "train.jsonl", "test": folder / "test.jsonl"}
    for part, path in zip((examples, questions), files.values(), strict=True):
        path.write_text("\n".join(json.dumps(row(d, 40 if shots else 300)) for d in part))
    return {
        "task": "countries",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(path) for name, path in files.items()}},
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "output_type": "generate_until",
        "doc_to_text": "{{text}}\nQuestion: {{question}}\nAnswer:",
        "doc_to_target": " {{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
    }


def row(document: Document, words: int) -> dict[str, str]:
    """A question as the task wants it, with so many words of its text."""
    text = " ".join(document.text.split()[:words])
    return {"text": text, "question": document.question, "answer": document.fact}


def choices(folder: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """The same task with four answers to choose from: its own, and those of the next questions."""
    for part in ("train", "test"):
        file = folder / f"{part}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for at, each in enumerate(rows):
            others = [rows[(at + step) % len(rows)]["answer"] for step in range(4)]
            each |= {"choices": [others[(at + step) % 4] for step in range(4)], "gold": -at % 4}
        file.write_text("\n".join(map(json.dumps, rows)))
    kept = {k: v for k, v in configuration.items() if k not in ("generation_kwargs", "metric_list")}
    return kept | {
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }


def evaluate(
    lm: Any, configuration: dict[str, Any]
) -> tuple[dict[str, Any], list[Any], float, float]:
    """Scores, answers, and seconds that the model's answers took, by the clock and of this process.

    lm-eval itself takes as long both ways, most of it to list the versions of what is installed.
    """
    import lm_eval

    generates = configuration["output_type"] == "generate_until"
    elapsed, busy, ask = 0.0, 0.0, "generate_until" if generates else "loglikelihood"
    answer = getattr(lm, ask)

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal elapsed, busy
        begin, began = time.perf_counter(), time.process_time()
        answers = answer(*args, **kwargs)
        elapsed += time.perf_counter() - begin
        busy += time.process_time() - began
        return answers

    with mock.patch.object(lm, ask, timed):
        out = lm_eval.simple_evaluate(model=lm, tasks=[configuration], bootstrap_iters=0)
    samples = out["samples"]["countries"]
    answers = [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
    return out["results"]["countries"], answers, elapsed, busy


def compare_choices(lm: Any, configuration: dict[str, Any], store: str) -> dict[str, Any]:
    """Time `HFLM` and `ChunkCacheLM`, and make sure that scores are the same."""
    from chunkcache.harness import ChunkCacheLM

    shots = configuration["num_fewshot"]
    namespace = f"{shots}-{uuid.uuid4().hex}"  # nothing is known
    how = {"batch_size": 1, "store": store, "namespace": namespace}
    plain = evaluate(lm, configuration)
    ours = ChunkCacheLM(pretrained=lm.model, tokenizer=lm.tokenizer, **how)
    before = chunkcache.metrics.snapshot()["tokens"]
    cached = evaluate(ours, configuration)
    if plain[0] != cached[0]:
        raise SystemExit(f"scores differ: {plain[0]} and {cached[0]}")
    after = chunkcache.metrics.snapshot()["tokens"]
    tokens = {kind: after[kind] - before[kind] for kind in after}
    return {
        "examples": shots,
        "questions": len(plain[1]),
        "tokens": sum(tokens.values()),
        "reused": round(tokens["reused"] / sum(tokens.values()), 3),
        "accuracy": round(plain[0]["acc,none"], 3),
        "hflm_s": round(plain[2], 1),
        "chunkcache_s": round(cached[2], 1),
        "times_faster": round(plain[2] / cached[2], 2),
        "hflm_cpu_s": round(plain[3], 1),
        "chunkcache_cpu_s": round(cached[3], 1),
        "times_less_cpu": round(plain[3] / cached[3], 2),
    }


def main() -> None:
    """Parse the command line, run the harness twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--store", default="memory://?bytes=2GB")
    parser.add_argument("--choices", action="store_true", help="log-likelihoods of four answers")
    options = parser.parse_args()
    if util.find_spec("lm_eval") is None:
        raise SystemExit("pip install lm_eval")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_smollm2()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        if options.choices:
            rows = []
            for shots in (SHOTS, 0):
                configuration = task(Path(folder), tokenizer, options.limit, shots)
                rows.append(
                    compare_choices(lm, choices(Path(folder), configuration), options.store)
                )
                print(rows[-1], flush=True)
            write(rows, RESULTS / "harness.csv")
            return
        configuration = task(Path(folder), tokenizer, options.limit)
        plain = evaluate(lm, configuration)
        with chunkcache.enabled(model, options.store) as context:
            cached = evaluate(lm, configuration)
    if plain[:2] != cached[:2]:
        raise SystemExit(f"scores or answers differ: {plain[0]} and {cached[0]}")
    view = Table(title=f"{len(plain[1])} questions, {SHOTS} examples each, SmolLM2-135M, float32")
    for column in ("", "exact match", "seconds"):
        view.add_column(column, justify="right" if column else "left")
    for name, (scores, _, elapsed, _) in (("no cache", plain), ("enabled()", cached)):
        view.add_row(name, f"{scores['exact_match,none']:.3f}", f"{elapsed:.1f}")
    console = Console()
    console.print(view)
    last = context.report
    console.print(
        f"the last prompt: {last.prompt_tokens} tokens, {last.computed} of them computed; "
        f"{plain[2] / cached[2]:.1f} times faster in all, answers the same"
    )


if __name__ == "__main__":
    main()
