"""KeySpace: under which keys, and in which form, chunks of one model and namespace are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from chunkcache.kv.codec import BlobForm, Codec
from chunkcache.kv.layout import KVLayout
from chunkcache.model.identity import ModelIdentity
from chunkcache.stores.base import OUTPUTS, STATE
from chunkcache.tokens.chunking import keyed_hash


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
    _prefix: str = field(init=False, repr=False)  # of the keys of chunks

    def __post_init__(self) -> None:
        object.__setattr__(self, "_prefix", str(self.identity.key("", self.codec.format)))

    def key(self, chunk_hash: str, format: str = "") -> str:
        """The store's key of a chunk, or of an entry of another format under a hash."""
        return str(self.identity.key(chunk_hash, format)) if format else self._prefix + chunk_hash

    @property
    def lossy(self) -> str:
        """The codec's name if K/V come back rounded, else `""`."""
        return "" if self.codec.is_exact(self.layout.dtype) else self.codec.name

    def apart(self, mark: bytes) -> KeySpace:
        """The same for prompts that share chunks with those of the same mark alone, if any."""
        salt = keyed_hash(self.salt, b"chunkcache/apart", mark) if mark else self.salt
        return replace(self, salt=salt)

    def output_form(
        self, layout: KVLayout, tokens: Sequence[int], start: int, chunk_hash: str
    ) -> BlobForm:
        """The form of the outputs of such a chunk, for the layout of the model's outputs."""
        key = self.key(chunk_hash) + OUTPUTS
        return self.codec.output_form(layout, tokens, start, chunk_hash, key)

    def state_form(self, tokens: Sequence[int], start: int, chunk_hash: str) -> BlobForm:
        """The form of the states behind such a chunk."""
        key = self.key(chunk_hash) + STATE
        return self.codec.state_form(self.layout, tokens, start, chunk_hash, key)

    def form(self, tokens: Sequence[int], start: int, chunk_hash: str) -> BlobForm:
        """The form of the blob of the chunk with these token ids, the first at position `start`."""
        key = self._prefix + chunk_hash
        return self.codec.form(self.layout, tokens, start, chunk_hash, key)
