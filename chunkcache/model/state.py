"""ModelState: the one small object that chunkcache attaches to a model, and all it keeps there."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from chunkcache.errors import StoreError
from chunkcache.gain import Gauge
from chunkcache.kv.layout import BufferPool, KVLayout
from chunkcache.kv.rope import KeyRotation
from chunkcache.model.foreign import foreign_code, without_foreign_hooks
from chunkcache.model.head import run_head_test
from chunkcache.model.identity import ModelIdentity, digest_config, numerics
from chunkcache.model.makeup import Lines, Makeup
from chunkcache.model.moving import find_rotation, verify_rotation
from chunkcache.model.outline import Outline
from chunkcache.model.ranks import Ranks
from chunkcache.model.self_test import (
    NoVerdict,
    SelfTest,
    measure_layout,
    run_self_test,
    zeros_matter,
)
from chunkcache.model.state_test import has_states, measure_states, run_state_test
from chunkcache.model.weights import PHASES, Watched, watch
from chunkcache.stores import named_urls, open_store
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.locks import ForkSafeLock

SELF_TEST_FORMAT = "self-test"
MOVING_FORMAT = "moving"
HEAD_FORMAT = "head"
# A self-test that could not run so often in a row waits so many times what it took.
_PROMPT_RETRIES = 3
_RETRY_WAIT = 50.0

_T = TypeVar("_T", SelfTest, KeyRotation | str)


@dataclass
class ModelState:
    """Identity and self-test of one model, and the stores opened for it by URL.

    Found through a weak dictionary, so that it goes with the model.
    """

    _model: weakref.ref[nn.Module]
    _locks: ForkSafeLock = field(default_factory=ForkSafeLock)
    foreign: str = ""  # hooks and the like of others, when the model was looked at last
    memory: BufferPool = field(default_factory=BufferPool)
    gauges: weakref.WeakKeyDictionary[ChunkStore, Gauge] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    caches: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)  # those alive
    _makeup: Makeup = field(default_factory=Makeup)
    _outline: Outline | None = None
    _watched: Watched | None = None
    _looks: int = 0
    _edited: set[str] = field(default_factory=set)
    _rest: tuple[object, ...] = ()
    _identity: ModelIdentity | None = None
    _self_tests: dict[str, SelfTest] = field(default_factory=dict)
    _heads: dict[str, SelfTest] = field(default_factory=dict)
    _verified: dict[str, KeyRotation | str] = field(default_factory=dict)
    _rotations: dict[str, KeyRotation | str] = field(default_factory=dict)
    # Of self-tests that could not run, how often in a row, and when to try again.
    _failures: dict[tuple[int, str], tuple[int, float]] = field(default_factory=dict)
    _zeros: dict[tuple[str, str], bool] = field(default_factory=dict)
    # Identities of which what the store gave was not what the model computed, and how that is told.
    distrust: dict[str, str] = field(default_factory=dict)
    _stores: dict[tuple[object, ...], ChunkStore] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """The state attached to a model, a new one the first time."""
        with _LOCK.own:
            state = _STATES.get(model)
            if state is None:
                state = _STATES[model] = cls(weakref.ref(model))
            return state

    @property
    def _lock(self) -> Any:
        return self._locks.own

    @property
    def model(self) -> nn.Module:
        """The model. It outlives whatever asks, since caches hold it."""
        model = self._model()
        assert model is not None
        return model

    @property
    def tested(self) -> nn.Module:
        """The model as self-tests call it: hooks of others do not see them."""
        return without_foreign_hooks(self.model) if self.foreign else self.model

    def identity(self) -> ModelIdentity:
        """The model's identity now: computed again only when the watch says that it may differ."""
        with self._lock:
            model = self.model
            outline = self._outline.again(model) if self._outline else Outline(model)
            self._outline = outline
            parts = outline.parts
            self._looks += 1
            watched = watch(model, parts, [self._looks % PHASES], self._watched)
            makeup = self._makeup.look(model, outline)
            self.foreign = foreign_code(model, parts)
            rest = (numerics(model), digest_config(model), *makeup)
            is_as_before = self._watched is not None and watched.is_like(self._watched)
            if self._identity is None or not is_as_before or rest != self._rest:
                if self._makeup.strange and rest != self._rest:
                    makeup = self._settled(makeup, outline)
                    rest = (*rest[:2], *makeup)
                if self._watched is not None:
                    self._edited |= watched.edited_since(self._watched)
                identity = ModelIdentity.of(model, self._edited, makeup)
                # All three or, if an interrupt lands before, none.
                now = watch(model, parts, before=watched)
                self._watched, self._rest, self._identity = now, rest, identity
            return self._identity

    def _settled(self, makeup: tuple[Lines, Lines], outline: Outline) -> tuple[Lines, Lines]:
        """The makeup without what code that is strange to us changes in each forward."""
        if self.model.training or self.foreign or self.ranks.size > 1:
            return makeup
        measure_layout(self.model)
        after = outline.again(self.model)
        self._makeup.forget_changes(makeup, self._makeup.look(self.model, after))
        return self._makeup.look(self.model, after)

    def self_test(self, identity: ModelIdentity, store: ChunkStore) -> SelfTest:
        """Whether K/V of that identity, the model's present one, may be reused.

        Known from before, known to the store, or tested now.
        """
        if reason := dict(identity.parts)["random"]:
            return SelfTest(reason)
        with self._lock:
            return self._verdict(
                self._self_tests, identity.digest, lambda: self._run_self_test(store, identity)
            )

    def head_test(self, identity: ModelIdentity, layout: KVLayout, store: ChunkStore) -> SelfTest:
        """Whether logits of that identity, the model's present one, can be had from hidden states.

        Known as for `self_test`. `layout` is what its layers cache.
        """

        def test() -> SelfTest:
            if self.ranks.size > 1:
                return SelfTest("the model is spread over several processes")
            passed = _has_passed(store, identity, HEAD_FORMAT)
            found = run_head_test(self.tested, None if passed else layout)
            if not (passed or found.bypass_reason):
                _note_passed(store, identity, HEAD_FORMAT)
            return found

        with self._lock:
            return self._verdict(self._heads, identity.digest, test)

    def distrust_head(self, identity: ModelIdentity, reason: str) -> None:
        """Its head was not called as the test has seen it: it is not fed any more."""
        self._heads[identity.digest] = SelfTest(reason)

    def verified_rotation(
        self, identity: ModelIdentity, layout: KVLayout, store: ChunkStore
    ) -> KeyRotation | str:
        """The verified rotation of that identity, the model's present one, or why there is none.

        The rotation is found anew by each process; that it is good enough is known from before,
        known to the store, or tested now.
        """

        def test() -> KeyRotation | str:
            passed = _has_passed(store, identity, MOVING_FORMAT)
            rotation = verify_rotation(self.tested, layout, passed)
            if not passed and not isinstance(rotation, str):
                _note_passed(store, identity, MOVING_FORMAT)
            return rotation

        with self._lock:
            return self._verdict(self._verified, identity.digest, test)

    def rotation(self, identity: ModelIdentity) -> KeyRotation | None:
        """How keys of that identity, the model's present one, turn with their position, if known.

        Unlike `verified_rotation`, not verified: good for turning them and turning them back.
        """
        with self._lock:
            found = self._verdict(
                self._rotations, identity.digest, lambda: find_rotation(self.tested)
            )
            return None if isinstance(found, str) else found

    def zeros_matter(self, identity: ModelIdentity, name: str) -> bool:
        """Whether zero token type ids change K/V of that identity, the model's present one."""
        with self._lock:
            key = (identity.digest, name)
            if key not in self._zeros:
                found = zeros_matter(self.model, name)
                if found is None:
                    return True
                self._zeros[key] = found
            return self._zeros[key]

    def _verdict(self, known: dict[str, _T], digest: str, test: Callable[[], _T]) -> _T:
        """What a self-test says of an identity, now or before.

        One that could not run says nothing, so it is tried again: at the next prompt and, if it
        goes on failing, at times, so that it takes little of all.
        """
        failure = self._failures.get((id(known), digest))
        if digest in known and (failure is None or time.monotonic() < failure[1]):
            return known[digest]
        began = time.monotonic()
        found = known[digest] = test()
        reason = found.bypass_reason if isinstance(found, SelfTest) else found
        self._failures.pop((id(known), digest), None)
        if isinstance(reason, NoVerdict) and self.ranks.size == 1:  # ranks test together
            count, now = (failure[0] + 1 if failure else 1), time.monotonic()
            wait = 0.0 if count < _PROMPT_RETRIES else _RETRY_WAIT * (now - began)
            self._failures[id(known), digest] = count, now + wait
        return found

    @property
    def ranks(self) -> Ranks:
        """The processes that share the model."""
        return Ranks.of(self.model)

    @property
    def is_known(self) -> bool:
        """Whether the model was looked at before."""
        return self._identity is not None

    def open(self, url: str | list[str] | None, **settings: Any) -> ChunkStore:
        """The store at a URL, or tiers, opened once for all caches of this model.

        Again if somebody has closed it.
        """
        with self._lock:
            # The environment may have changed since the last cache.
            named = named_urls() if url is None or url == "" else url
            key = (tuple(named) if isinstance(named, list) else named, *sorted(settings.items()))
            if key not in self._stores or self._stores[key].closed:
                self._stores[key] = open_store(url, **settings)
            return self._stores[key]

    def _run_self_test(self, store: ChunkStore, identity: ModelIdentity) -> SelfTest:
        # Tests are forwards, which all ranks run or none.
        if self.ranks.all(_has_passed(store, identity, SELF_TEST_FORMAT)):
            found = (measure_states if has_states(self.model) else measure_layout)(self.tested)
            if self.ranks.all(not found.bypass_reason):
                return found
        found = (run_state_test if has_states(self.model) else run_self_test)(self.tested)
        if not found.bypass_reason:
            _note_passed(store, identity, SELF_TEST_FORMAT)
        return found


def _has_passed(store: ChunkStore, identity: ModelIdentity, format: str) -> bool:
    """Whether this very model has passed in another process. Only that is taken on trust."""
    try:
        fields = store.read_metadata([str(identity.key(identity.digest, format))])[0] or {}
    except StoreError:
        return False
    return fields.get("identity") == identity.digest and fields.get("passed") == "yes"


def _note_passed(store: ChunkStore, identity: ModelIdentity, format: str) -> None:
    fields = {
        "model": identity.name,
        "identity": identity.digest,
        "parts": json.dumps(dict(identity.parts)),  # to tell in what another model differs
        "passed": "yes",
    }
    key = str(identity.key(identity.digest, format))
    with suppress(StoreError):  # the next process tests again
        store.write([Entry(key, fields, memoryview(b""))])


_STATES: weakref.WeakKeyDictionary[nn.Module, ModelState] = weakref.WeakKeyDictionary()
_LOCK = ForkSafeLock()
