"""One store, several processes: what one has computed, another finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chunkcache import RedisChunkCache, open_store
from tests.models import tiny, tokens

# So that scripts find the tests, wherever they are themselves.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
KINDS = [
    "llama",
    "bloom",  # ALiBi
    "deepseek_v3",  # latent attention, experts
    "gemma3_text",  # windows, two bases
    "gemma3n_text",  # layers that share K/V
    "gpt2",  # learned positions
    "mixtral",
    "qwen3_next",  # falls back to normal prefill
]
IDS = tokens(300, seed=1)
HOW = {"max_new_tokens": 6, "do_sample": False}


def four_bits(folder: Path) -> Any:
    """A checkpoint whose weights are quantised as it is loaded."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32
    ).eval()


def in_turn(folder: str, url: str) -> dict[str, tuple[list[int], int]]:
    """Answer and reused tokens of each model."""
    found = {}
    with open_store(url) as store:
        for kind in [*KINDS, "4 bits"]:
            model: Any = four_bits(Path(folder)) if kind == "4 bits" else tiny(kind)
            cache = RedisChunkCache(model, store)
            out = model.generate(IDS, past_key_values=cache, **HOW)
            cache.flush()
            found[kind] = (out[0, IDS.shape[1] :].tolist(), cache.report.reused)
    return found


def test_cold_here_and_warm_in_another_process(tmp_path: Path, redis_server: Any) -> None:
    folder, url = str(tmp_path / "model"), redis_server.unix_url
    tiny().save_pretrained(folder)
    here = in_turn(folder, url)
    script = "import json, sys; from tests.test_processes import in_turn;"
    script += "print(json.dumps(in_turn(*sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", script, folder, url],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = json.loads(done.stdout.splitlines()[-1])
    for kind, (answer, reused) in here.items():
        model: Any = four_bits(Path(folder)) if kind == "4 bits" else tiny(kind)
        plain = model.generate(IDS, **HOW)[0, IDS.shape[1] :].tolist()
        assert answer == there[kind][0] == plain, kind
        assert (reused, there[kind][1]) == (0, 256 if kind == "qwen3_next" else 299), kind


EVALUATION = """
import json, sys
from accelerate import PartialState
import chunkcache
from tests.models import tiny
from tests.test_processes import HOW, QUESTIONS, prompt

state, (url, out) = PartialState(cpu=True), sys.argv[1:]
assert state.num_processes == 2
model, results = tiny(), []
with chunkcache.enabled(model, url) as cache:
    for questions in (QUESTIONS, QUESTIONS[::-1]):  # each process gets what the other one had
        with state.split_between_processes(questions) as mine:
            for question in mine:
                answer = model.generate(prompt(question), **HOW)
                cache.flush()
                results.append([question, answer[0, 300:].tolist(), cache.report.reused])
        state.wait_for_everyone()
json.dump(results, open(f"{out}.{state.process_index}", "w"))
state.destroy_process_group()
"""
QUESTIONS = list(range(8))


def prompt(question: int) -> torch.Tensor:
    """`[1, 300]`: 256 tokens of examples that all questions share, and a question."""
    return torch.cat([IDS[:, :256], tokens(44, seed=10 + question)], dim=1)


def test_an_evaluation_that_accelerate_spreads(tmp_path: Path, redis_server: Any) -> None:
    script, out = tmp_path / "evaluate.py", tmp_path / "out"
    script.write_text(EVALUATION)
    # With --cpu, accelerate starts several processes through MPI alone.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "--main_process_port=0", str(script)]
    done = subprocess.run(
        [*command, redis_server.unix_url, str(out)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1)]
    asked = [[question for question, *_ in rank] for rank in ranks]
    assert asked == [[0, 1, 2, 3, 7, 6, 5, 4], [4, 5, 6, 7, 3, 2, 1, 0]]
    model = tiny()
    plain = {q: model.generate(prompt(q), **HOW)[0, 300:].tolist() for q in QUESTIONS}
    for rank in ranks:
        for question, answer, _ in rank:
            assert answer == plain[question]
        reused = [found for *_, found in rank]
        assert all(found >= 256 for found in reused[1:4])
        assert all(found == 299 for found in reused[4:])
    # Two chunks of examples and one tail for each question, whoever wrote them.
    assert len(redis_server.client().keys("safetensors@*@kv_bytes")) == 2 + len(QUESTIONS)
