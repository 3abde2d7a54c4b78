"""One measured answer: how long the first token takes, and what it was reused from.

`in_fresh_process` measures in a process that knows nothing but the store. It is started as
`python -m chunkcache.doctor.measure`, with a `Job` as JSON on stdin and a `Run` as JSON on stdout
(a command line could show the store's password to others).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from chunkcache.cache import RedisChunkCache
from chunkcache.errors import ChunkCacheError, SettingError
from chunkcache.model.check import CACHE
from chunkcache.model.loading import load_model
from chunkcache.samples import document, quiet_transformers
from chunkcache.stores.address import without_password
from chunkcache.stores.base import ChunkStore
from chunkcache.tokens.texts import chat_inputs, most_positions

WARM_UP_TOKENS = 256
QUESTIONS = (
    "What is the text above about? Answer in one sentence.",
    "Name one function that the text above describes, and say what it does.",
)


@dataclass(frozen=True, slots=True)
class Job:
    """What a run is given: `use_cache` says whether through the store, `question` which one.

    `store` is a URL, or those of tiers.
    """

    model: str
    store: str | list[str]
    namespace: str
    tokens: int
    max_new_tokens: int
    question: int
    use_cache: bool
    tags: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it. `measure` tells what the times are of; `decode_ms` is that of one token."""

    first_token_ms: float
    decode_ms: float
    setup_ms: float
    prompt_tokens: int
    reused: int
    bytes_written: int
    answer_ids: list[int]
    answer: str
    report: str


class Stopwatch(BaseStreamer):
    """Notes when `generate()` hands out its new tokens."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.tokens: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The first call brings the prompt, each other one a new token."""
        if self._prompt_seen:
            self.tokens.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do."""

    @property
    def first_token_ms(self) -> float:
        """From the beginning to the first new token."""
        return 1e3 * (self.tokens[0] - self.started)

    @property
    def decode_ms(self) -> float:
        """Of one token after the first, on average; 0 if there is none."""
        later = len(self.tokens) - 1
        return 1e3 * (self.tokens[-1] - self.tokens[0]) / later if later else 0.0


class Measurer:
    """A loaded model that can do jobs.

    Raises:
        SettingError: The model cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        self.model, self.tokenizer = load_model(model)
        # Threads and buffers that a process makes once are nobody's time to first token.
        ids = torch.ones(1, WARM_UP_TOKENS, dtype=torch.long, device=self.model.device)
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False
        )

    def check(self, job: Job) -> None:
        """Raise SettingError if the prompt is too long for the model, or cannot be made."""
        self._prompt(job)

    def measure(self, job: Job, store: ChunkStore | None = None) -> Run:
        """Answer a question greedily, and time it.

        The time to the first token runs from the call of `generate()` to its first new token:
        lookup in the store, reading, and prefill of the rest. Loading the model and tokenizing
        come before, and making the cache object (connecting to the store, and once per model
        hashing its weights and probing it), which `setup_ms` tells. `store` is that of the job, if
        it is open already.

        Raises:
            SettingError: The prompt is too long for the model, or cannot be made.
        """
        inputs = self._prompt(job)
        started = time.perf_counter()
        if not job.use_cache:
            return self._generate(job, inputs, started, None)
        with RedisChunkCache(
            self.model, store or job.store, namespace=job.namespace, tags=job.tags
        ) as cache:
            return self._generate(job, inputs, started, cache)

    def _prompt(self, job: Job) -> dict[str, torch.Tensor]:
        # The document stands first: whatever is asked about it, its tokens are the same.
        text = f"{document(job.tokens, self.tokenizer)}\n\n{QUESTIONS[job.question]}"
        if self.tokenizer.chat_template:
            inputs = chat_inputs(self.tokenizer, text)
        else:
            inputs = self.tokenizer(f"{text}\n\nAnswer:", return_tensors="pt")
        longest = most_positions(self.model.config)
        needed = inputs["input_ids"].shape[1] + job.max_new_tokens
        if needed > longest:
            raise SettingError(
                f"--tokens {job.tokens} makes {needed:,} tokens with question and answer; "
                f"this model takes {longest:,}: ask for a shorter document"
            )
        return {
            name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }

    def _generate(
        self,
        job: Job,
        inputs: dict[str, torch.Tensor],
        setup_started: float,
        cache: RedisChunkCache | None,
    ) -> Run:
        watch = Stopwatch()
        ids = self.model.generate(
            **inputs,
            **{CACHE: cache},
            max_new_tokens=job.max_new_tokens,
            do_sample=False,
            streamer=watch,
        )
        prompt_tokens = inputs["input_ids"].shape[1]
        answer = ids[0, prompt_tokens:]
        if cache is not None:
            cache.flush()
        return Run(
            first_token_ms=watch.first_token_ms,
            decode_ms=watch.decode_ms,
            setup_ms=1e3 * (watch.started - setup_started),
            prompt_tokens=prompt_tokens,
            reused=cache.report.reused if cache is not None else 0,
            bytes_written=cache.report.bytes_written if cache is not None else 0,
            answer_ids=answer.tolist(),
            answer=str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip(),
            report=str(cache.report) if cache is not None else "",
        )


def store_name(store: str | list[str]) -> str:
    """A store's URL, or those of its tiers, without passwords."""
    return " ".join(map(without_password, [store] if isinstance(store, str) else store))


def in_fresh_process(job: Job) -> Run:
    """Measure in a new process of the same Python.

    Raises:
        ChunkCacheError: The process failed; its last line says why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "chunkcache.doctor.measure"],
        input=json.dumps(dataclasses.asdict(job)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ChunkCacheError(f"the new process failed: {last}")
    return Run(**json.loads(done.stdout))


def _worker() -> None:
    job = Job(**json.load(sys.stdin))
    # Whatever a library prints must not get between the lines of JSON.
    with redirect_stdout(sys.stderr), quiet_transformers():
        run = Measurer(job.model).measure(job)
    json.dump(dataclasses.asdict(run), sys.stdout)


if __name__ == "__main__":
    _worker()
