"""Models on a device, the pretended one, in a process of its own: there torch knows no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_on_the_pretended_device() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.on_device", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests/device"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
