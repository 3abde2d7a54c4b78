"""How reuse at any position does by task: copying a fact, comparing two documents, counting.

    python -m benchmarks.tasks            # 24 sets of documents, SmolLM2: about half an hour

Each set is 3 to 6 countries in random order, with a question for each task. The full run's answer
is followed token by token (see `fidelity.py`), with documents met in other prompts, and prepared by
`add_documents` behind the system prompt and another document of their kind. Prints a table, and
writes `tasks.csv` to benchmarks/results; outcomes that are there already are kept.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.corpus import documents, history, tasks
from benchmarks.fidelity import run_arm, run_full
from benchmarks.quality import RESULTS, ask, interval, meet, prepare, read, write
from chunkcache.samples import load_smollm2
from chunkcache.stores.memory import MemoryStore

POOL = 24
ARMS = [(how, repair) for how in ("met", "prepared") for repair in ("head:4", "query:0.035")]


def measure(sets: int, seed: int, known: set[int]) -> Any:
    """One row per set, task and arm."""
    model, tokenizer = load_smollm2()
    rng = random.Random(seed)
    pool = documents("country", "test", tokenizer)
    pool, filler = pool[:POOL], pool[POOL]
    stores = {"met": MemoryStore(1 << 36), "prepared": MemoryStore(1 << 36)}
    meet(model, tokenizer, history(pool, rng), stores["met"])
    prepare(model, tokenizer, pool, filler, stores["prepared"])
    for number in range(sets):
        exact = MemoryStore(1 << 36)
        for task, prompt in tasks(pool, rng):
            if number in known:
                continue
            question = ask(tokenizer, prompt)
            full = run_full(model, tokenizer, question, exact)
            for how, repair in ARMS:
                outcome = run_arm(model, tokenizer, question, full, stores[how], repair)
                row = {"prompt": number, "kind": task, "arm": f"{how} {repair}"}
                yield {**row, "full_right": full.right, **asdict(outcome)}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "tasks.csv"
    known = {row["prompt"] for row in read(path)} if path.exists() else set()
    write(measure(options.sets, options.seed, known), path, "a")
    view = Table("task", "arm", "prompts", "KL (nats)", "top-1", "right")
    rows = read(path)
    for kind, arm in dict.fromkeys((row["kind"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["arm"]) == (kind, arm)]
        kl = "{:.3f} ({:.3f} – {:.3f})".format(*interval([row["kl"] for row in mine]))
        top1 = "{:.1f} % ({:.1f} – {:.1f})".format(*interval([100 * row["top1"] for row in mine]))
        right = [row["right"] for row in mine if row["full_right"]]
        view.add_row(kind, arm, str(len(mine)), kl, top1, f"{sum(right)} of {len(right)}")
    Console(width=100).print(view)


if __name__ == "__main__":
    main()
