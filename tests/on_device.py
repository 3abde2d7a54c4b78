"""A pytest plugin: the tests' tiny models, token ids and prompts, on the simulated device.

`make test-device` loads it (`-p tests.on_device`), so that tests written for the CPU run as they
are on `fakegpu`; `tests/test_device.py` runs a part so, in a process of its own. What a test makes
itself lies on the CPU as before, as it does for users who forget to move it; where it then mixes
the two itself, it is skipped.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fakegpu, models

fakegpu.install()
ROOT = Path(__file__).parent.parent


def _moved(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _moved(item) for name, item in value.items()}
    return value.to(fakegpu.NAME)


def _back(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _on_device(function: Any) -> Any:
    return lambda *args, **kwargs: _moved(function(*args, **kwargs))


models.tiny, models.tokens = _on_device(models.tiny), _on_device(models.tokens)
_assert_close = torch.testing.assert_close
torch.testing.assert_close = lambda mine, its, **how: _assert_close(_back(mine), _back(its), **how)
prompts = import_module("tests.prompts")  # not before: it takes these two from there
_logits = prompts.logits
prompts.logits = lambda model, prompt, cache=None: _logits(model, _moved(prompt), cache)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Skip a test that mixes the CPU and the device itself, or gives a model ids on the CPU."""
    try:
        return (yield)
    except (RuntimeError, TypeError) as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        parts = [Path(file.removeprefix(str(ROOT))).parts for file in files]
        # Who has mixed them: nobody of torch, and not the device itself.
        whose = next(p for p in reversed(parts) if "torch" not in p and "fakegpu.py" not in p)
        is_mixed = any(text in str(error) for text in ("same device", "can't convert fakegpu"))
        every = {part for names in parts for part in names}
        takes_ids = "sparse.py" in every and "chunkcache" not in every  # an embedding
        if not is_mixed or not ("tests" in whose or takes_ids):
            raise
        pytest.skip(f"written for the CPU: {error}")
