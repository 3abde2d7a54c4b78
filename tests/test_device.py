"""Models on a device, the simulated one, in a process of its own: there torch knows no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What `make test-device` runs besides: more architectures, and more of what takes long.
LEFT_OUT = (
    "qwen3 or gemma2 or phi or gpt_neox or gpt2 or cohere or mixtral or mimo or bloom or assisted "
    "or num_return or beams-gemma or how1 or how2 or falcon_h1 or deepseek_v32"
)


def test_on_the_pretended_device() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.on_device", "-p", "no:cacheprovider"]
    command += ["tests/device", "-k", f"not ({LEFT_OUT})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
