"""Makeup: what shapes a model's K/V besides weights and configuration, looked at each prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedConfig

from chunkcache.model.attributes import Attributes
from chunkcache.model.code import Reach
from chunkcache.model.outline import Outline
from chunkcache.model.values import Values

Lines = dict[str, object]


class Makeup:
    """Attributes and code of one model, described anew only where something may have changed.

    Attributes:
        strange: Whether code of others than the libraries was found at the last look.
    """

    def __init__(self) -> None:
        self.strange = False
        self._attributes = Attributes()
        self._passing: set[str] = set()
        self._start: frozenset[object] = frozenset()
        self._reach: Reach | None = None
        self._code: Lines = {}
        self._is_strange = False

    def look(self, model: nn.Module, outline: Outline) -> tuple[Lines, Lines]:
        """Attributes and code, each by place."""
        inner = configurations(model.config)  # type: ignore[arg-type]
        known = outline.numbers | {id(part): name for name, part in inner.items()}
        values = Values(known)
        self._attributes.add(values, outline, model.training)
        classes = outline.classes
        attention = {part._attn_implementation for part in inner.values()} - {None}
        now = frozenset((*classes, *attention, *values.reached))
        if self._reach is None or now != self._start or not self._reach.is_unchanged():
            code = Values(known)
            self._reach = Reach(code, classes, attention, values.reached)
            self._start, self._code = now, code.lines
            self._is_strange = code.strange
            code.let_go()
        self.strange = values.strange or self._is_strange
        if self.strange:  # it may change within, and is not to be kept alive
            self._reach, self._start = None, frozenset()
        return self._lasting(values.lines), self._lasting(self._code)

    def forget_changes(self, before: tuple[Lines, Lines], after: tuple[Lines, Lines]) -> None:
        """Leave out from now on what was another after a forward: counters, what is remembered."""
        for one, two in zip(before, after, strict=True):
            names = one.keys() | two.keys()
            self._passing |= {name for name in names if one.get(name) != two.get(name)}

    def _lasting(self, lines: Lines) -> Lines:
        if not self._passing:
            return lines
        return {name: value for name, value in lines.items() if not self._is_passing(name)}

    def _is_passing(self, name: str) -> bool:
        return any(name == p or name.startswith((f"{p}.", f"{p}[")) for p in self._passing)


def configurations(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """A model's configuration and those within it, by name."""
    inner = {n: part for n, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
    return {"config": config, **inner}


def digest(lines: Mapping[str, object]) -> str:
    """SHA-256 over a description (64 hex digits)."""
    return hashlib.sha256(repr(sorted(lines.items())).encode()).hexdigest()
