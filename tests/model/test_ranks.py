"""Tensor parallel: each rank keeps its own heads, and all leave the same tokens to the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chunkcache.model.ranks import Ranks, local
from tests.models import tiny, tokens

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from chunkcache import RedisChunkCache, UnsupportedModelError, catalog, open_store

folder, url, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
rank = dist.get_rank()
ids = torch.tensor(json.load(open(out + ".ids")))
store = open_store(url)

def generate(**settings):
    cache = RedisChunkCache(model, store, **settings)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    cache.flush()
    dist.barrier()
    report = cache.report
    return {
        "tokens": found.tolist(), "computed": report.computed, "skipped": report.skipped,
        "hashes": [span.key for span in report.rows[0].spans],
    }

results = {"cold": generate(), "warm": generate()}
if rank == 1:  # one half of the second chunk is gone
    end = "@2@1@" + results["warm"]["hashes"][1]
    store.delete([e.key for e in catalog.entries(store) if e.key.endswith(end)])
    store.flush()
dist.barrier()
results["one rank misses"] = generate()
results["repaired"] = generate()
results["off for one"] = generate(reuse="off" if rank else "prefix")
try:
    RedisChunkCache(model, store, reuse="anywhere")
except UnsupportedModelError as error:
    results["anywhere"] = str(error)
json.dump(results, open(f"{out}.{rank}", "w"))
dist.destroy_process_group()
"""


def test_a_single_process_agrees_with_itself():
    ranks = Ranks.of(tiny())
    assert (ranks.size, ranks.rank, ranks.bypass_reason) == (1, 0, "")
    assert ranks.least(7) == 7
    assert ranks.all(True)
    assert not ranks.all(False)
    tensor = torch.ones(2)
    assert local(tensor) is tensor


def test_two_ranks_share_a_model(tmp_path: Path, redis_server):
    model, ids = tiny("llama"), tokens(300, seed=3)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    model.save_pretrained(tmp_path / "model")
    script, out = tmp_path / "worker.py", tmp_path / "out"
    script.write_text(WORKER)
    Path(f"{out}.ids").write_text(json.dumps(ids.tolist()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "model"), redis_server.unix_url, str(out)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in (0, 1))
    for name in ("cold", "warm", "one rank misses", "repaired", "off for one"):
        for rank in (first, second):
            assert rank[name]["tokens"] == plain, name
            assert not rank[name]["skipped"], name
        assert first[name]["computed"] == second[name]["computed"], name
    computed = {name: first[name]["computed"] for name in first if name != "anywhere"}
    assert computed["cold"] == computed["off for one"] == 300
    assert computed["warm"] == computed["repaired"] < 50
    assert computed["one rank misses"] == 300 - 128
    assert "tensor parallel" in first["anywhere"]
    keys = redis_server.client().keys("safetensors@*@metadata")
    owners = [tuple(key.decode().split("@")[2:4]) for key in keys]
    assert owners.count(("2", "0")) == owners.count(("2", "1")) > 0


@pytest.mark.parametrize("shape", [{"pp": 2, "tp": 1}, {"fsdp": 2, "tp": 2}])
def test_other_ways_of_spreading_a_model_are_not_guessed(shape):
    class Mesh:
        mesh_dim_names = tuple(shape)
        shape_ = tuple(shape.values())

    Mesh.shape = Mesh.shape_
    model = tiny()
    model._device_mesh = Mesh()
    assert "unsupported way" in Ranks.of(model).bypass_reason
