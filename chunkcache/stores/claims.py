"""Claims: of several processes that meet the same new prompt, one writes its chunks.

Who is about to write a blob leaves a sign where its metadata will stand. To a reader it is nothing;
other writers leave the blob to its owner. It lapses, should its writer end before.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import redis

from chunkcache.stores.address import Address
from chunkcache.stores.base import Entry
from chunkcache.stores.commands import Commands
from chunkcache.stores.stream import is_wrong_type

CLAIM_SECONDS = 10.0  # time to send one blob; who takes longer may find it sent twice
SIGN = b"being written by "


class Claims(Commands):
    """Commands that claim what will be written."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._name = uuid.uuid4().hex
        self._awaited: dict[str, float] = {}  # claimed by others, until when (monotonic seconds)

    def _claim(self, entries: Sequence[Entry]) -> set[str]:
        """Announce that we write these blobs. Returns the keys that need no writing by us."""
        own_sign = self._own_sign()

        def claim(pipe: Any, entry: Entry) -> None:
            metadata, blob = self._names(entry.key)
            pipe.strlen(blob)
            pipe.get(metadata)  # another's sign, or the error that real metadata are there
            pipe.set(metadata, own_sign, nx=True, px=round(CLAIM_SECONDS * 1000))

        there: list[Entry] = []
        settled: set[str] = set()
        replies = self._pipelined(entries, claim)
        with self._store_errors():
            for entry, (size, sign, won) in zip(entries, replies, strict=True):
                if isinstance(sign, redis.ResponseError) and is_wrong_type(sign):
                    there += [entry] if size == entry.nbytes else []
                elif isinstance(sign, bytes) and sign.startswith(SIGN):
                    settled |= {entry.key} if sign != own_sign else set()
                elif isinstance(won, redis.ResponseError):
                    self._check(won)
                elif sign is None and not won:  # another came in between
                    settled.add(entry.key)
        self._await(settled)
        pinned = [entry.key for entry in there if entry.pinned]
        self._pipelined(pinned, lambda pipe, key: [pipe.persist(name) for name in self._names(key)])
        return settled.union(entry.key for entry in there)

    def _give_up_claims(self, keys: Sequence[str]) -> None:
        """Let others write what we have announced and could not write."""
        own_sign = self._own_sign()
        replies = self._pipelined(keys, lambda pipe, key: pipe.get(self._names(key)[0]))
        ours = [key for key, (sign,) in zip(keys, replies, strict=True) if sign == own_sign]
        self._pipelined(ours, lambda pipe, key: pipe.unlink(self._names(key)[0]))

    def _await(self, keys: Iterable[str]) -> None:
        """Remember for `flush` what others write now, and forget what must have lapsed."""
        now = time.monotonic()
        self._awaited |= dict.fromkeys(keys, now + CLAIM_SECONDS)
        for key in [key for key, until in list(self._awaited.items()) if until < now]:
            self._awaited.pop(key, None)

    def _claimed_by_others(self) -> bool:
        """Whether a sign still stands that kept us from writing."""
        awaited = list(self._awaited)
        replies = self._pipelined(awaited, lambda pipe, key: pipe.get(self._names(key)[0]))
        for key, (sign,) in zip(awaited, replies, strict=True):
            if not (isinstance(sign, bytes) and sign.startswith(SIGN)):
                self._awaited.pop(key, None)
        return bool(self._awaited)

    def _own_sign(self) -> bytes:
        return SIGN + f"{os.getpid()} {self._name}".encode()  # a fork has the same name
