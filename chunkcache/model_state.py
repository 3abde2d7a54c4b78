"""ModelState: the one small object that chunkcache attaches to a model, and all it keeps there."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from torch import nn

from chunkcache.errors import StoreError
from chunkcache.identity import ModelIdentity, numerics
from chunkcache.proof import Proof, prove
from chunkcache.stores import open_store
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.weights import watch

PROOF_FORMAT = "proof"


@dataclass
class ModelState:
    """Identity and proof of one model, and the stores opened for it by URL.

    Found through a weak dictionary, so that it goes with the model.
    """

    _model: weakref.ref[nn.Module]
    _lock: RLock = field(default_factory=RLock)
    _watched: dict[str, object] = field(default_factory=dict)
    _edited: set[str] = field(default_factory=set)
    _numerics: str = ""
    _identity: ModelIdentity | None = None
    _proofs: dict[str, Proof] = field(default_factory=dict)
    _stores: dict[tuple[object, ...], ChunkStore] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """The state attached to a model, a new one the first time."""
        with _LOCK:
            state = _STATES.get(model)
            if state is None:
                state = _STATES[model] = cls(weakref.ref(model))
            return state

    @property
    def model(self) -> nn.Module:
        """The model. It outlives whatever asks, since caches hold it."""
        model = self._model()
        assert model is not None
        return model

    def identity(self) -> ModelIdentity:
        """The model's identity now: computed again only when the watch says that it may differ."""
        with self._lock:
            watched, switches = watch(self.model), numerics(self.model)
            if self._identity is None or watched != self._watched or switches != self._numerics:
                if self._identity is not None:
                    self._edited |= {
                        name
                        for name, seen in watched.items()
                        if self._watched.get(name, seen) != seen
                    }
                self._watched, self._numerics = watched, switches
                self._identity = ModelIdentity.of(self.model, self._edited)
            return self._identity

    def proof(self, store: ChunkStore) -> Proof:
        """Whether the model's K/V may be reused: known, kept in the store, or tested now."""
        with self._lock:
            identity = self.identity()
            if identity.digest not in self._proofs:
                self._proofs[identity.digest] = self._stored_proof(store, identity) or self._prove(
                    store, identity
                )
            return self._proofs[identity.digest]

    def open(self, url: str | None, **settings: Any) -> ChunkStore:
        """The store at a URL, opened once for all caches of this model."""
        with self._lock:
            key = (url, *sorted(settings.items()))
            if key not in self._stores:
                self._stores[key] = open_store(url, **settings)
            return self._stores[key]

    def _stored_proof(self, store: ChunkStore, identity: ModelIdentity) -> Proof | None:
        key = str(identity.key(identity.digest, PROOF_FORMAT))
        try:
            return Proof.from_metadata(store.read_metadata([key])[0], self.model)
        except StoreError:
            return None

    def _prove(self, store: ChunkStore, identity: ModelIdentity) -> Proof:
        proof = prove(self.model)
        if not proof.obstacle:
            key = str(identity.key(identity.digest, PROOF_FORMAT))
            fields = {"model": identity.name, "identity": identity.digest, **proof.to_metadata()}
            with suppress(StoreError):  # the next process tests again
                store.write([Entry(key, fields, memoryview(b""))])
        return proof


_STATES: weakref.WeakKeyDictionary[nn.Module, ModelState] = weakref.WeakKeyDictionary()
_LOCK = RLock()
