"""KeySpace: under which keys, and in which form, chunks of one model and namespace are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkcache.kv.codec import KVLayout
from chunkcache.kv.coding import Codec, Form
from chunkcache.model.identity import ModelIdentity


@dataclass(frozen=True, slots=True)
class KeySpace:
    """Made once for each identity of a model.

    Attributes:
        identity: The model's.
        layout: What its layers cache.
        salt: What every hash begins with: model, namespace, secret, codec.
        codec: How blobs are written and read.
    """

    identity: ModelIdentity
    layout: KVLayout
    salt: bytes = field(repr=False)
    codec: Codec

    def key(self, chunk_hash: str, format: str = "") -> str:
        """The store's key of a chunk, or of an entry of another format under a hash."""
        return str(self.identity.key(chunk_hash, format or self.codec.format))

    @property
    def lossy(self) -> str:
        """The codec's name if K/V come back rounded, else `""`."""
        return "" if self.codec.is_exact(self.layout.dtype) else self.codec.name

    def form(self, tokens: Sequence[int], start: int, chunk_hash: str) -> Form:
        """The form of the blob of the chunk with these token ids, the first at position `start`."""
        return self.codec.form(self.layout, tokens, start, chunk_hash, self.key(chunk_hash))
