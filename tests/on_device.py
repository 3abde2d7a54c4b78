"""A pytest plugin: the tests' tiny models, token ids and prompts, on the pretended device.

`make test-device` loads it (`-p tests.on_device`), so that tests written for the CPU run as they
are on `fakegpu`; `tests/test_device.py` runs a part so, in a process of its own. What a test makes
itself lies on the CPU as before, as it does for users who forget to move it.
"""

from __future__ import annotations

from typing import Any

import pytest

import tests.models
import tests.prompts
from tests import fakegpu

fakegpu.install()

# Tests that are about the CPU, or that mix what lies there with what lies on the device themselves.
NOT_HERE: dict[str, str] = {}


def _moved(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _moved(item) for name, item in value.items()}
    return value.to(fakegpu.NAME)


def _on_device(function: Any) -> Any:
    return lambda *args, **kwargs: _moved(function(*args, **kwargs))


_logits = tests.prompts.logits
tests.models.tiny = _on_device(tests.models.tiny)
tests.models.tokens = _on_device(tests.models.tokens)
tests.prompts.logits = lambda model, prompt, cache=None: _logits(model, _moved(prompt), cache)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not for the device."""
    left_out = [item for item in items if _is_not_here(item.nodeid)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def _is_not_here(name: str) -> bool:
    return any(part in name for part in NOT_HERE)
