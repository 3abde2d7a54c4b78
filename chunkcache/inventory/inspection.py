"""Inspection: what one blob holds, and whether it is whole, as far as that needs no model.

For people who look, and for copies. Nothing here decides whether a blob is used: that is checked
against what the chunk must be, byte by byte (see `codec.py`).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, deserialize

from chunkcache.errors import BlobError, SettingError
from chunkcache.keys import SEALED, ZSTD, ChunkKey
from chunkcache.kv.compress import decompress
from chunkcache.kv.seal import OVERHEAD
from chunkcache.stores.base import ChunkStore, Listed, read_blobs
from chunkcache.tokens.chunking import from_text

# The types that keys and values have as they are, and what reads them.
_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of bytes sorted before they are compressed
_MOST_INFLATED = 1 << 31
_LAYER = re.compile(r"layers\.(\d{1,6})\.(keys|values)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Norms:
    """Of one layer: the length of a token's key and value in a head, on average; L2."""

    layer: int
    keys: float
    values: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a blob holds.

    Attributes:
        header: The safetensors header: its `__metadata__`, and each tensor's type, shape and place.
        norms: Layer by layer; empty where the numbers are not keys and values as they are.
        unread: Why something is missing above, or `""`.
        text: What its tokens say, where a tokenizer was there to tell.
    """

    header: dict[str, Any]
    norms: tuple[Norms, ...]
    unread: str = ""
    text: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; `None` for what is no finite number."""
        told = asdict(self)
        for norms in told["norms"]:
            for part in ("keys", "values"):
                norms[part] = norms[part] if math.isfinite(norms[part]) else None
        return told


def inspect(store: ChunkStore, key: str) -> Inspection:
    """Look into the blob of a key.

    Raises:
        StoreError: The store failed.
    """
    try:
        form = ChunkKey.parse(key).format
    except SettingError:
        return Inspection({}, (), "this is not the key of a chunk")
    if "+" in form:
        return Inspection({}, (), f"a blob of the format {form} is read by caches only")
    (blob,) = (None if view is None else bytes(view) for view in read_blobs(store, [key]))
    if blob is None:
        return Inspection({}, (), "the blob is not there")
    try:
        tensors = dict(deserialize(blob))  # type: ignore[no-untyped-call]
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    except (SafetensorError, ValueError, OverflowError) as error:
        return Inspection({}, (), f"the blob is damaged: {error}")
    if not all(tensor["dtype"] in _NUMBERS for tensor in tensors.values()):
        return Inspection(header, (), "its numbers are not keys and values as they are")
    return Inspection(header, _norms(tensors))


def check_blob(entry: Listed, blob: memoryview) -> None:
    """Compare a blob with what its key and metadata say: hash, tokens, positions, shapes, checksum.

    Of a sealed blob only the length can be compared.

    Raises:
        BlobError: They differ.
        SettingError: The blob is compressed, and the package for that is missing.
    """
    key, fields = ChunkKey.parse(entry.key), entry.metadata or {}
    sealed = key.format.endswith(SEALED)
    if fields.get("bytes") != str(blob.nbytes) or (sealed and blob.nbytes < OVERHEAD):
        raise BlobError("its length is not that in its metadata")
    if sealed:
        return
    zipped = key.format.endswith(ZSTD)
    if zipped and find_spec("zstandard") is None:
        raise SettingError("--verify needs zstandard here: pip install 'chunkcache[zstd]'")
    try:
        whole = _inflated(blob) if zipped else blob
        begin = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(bytes(whole[8:begin]))
        own, data = header.pop("__metadata__"), whole[begin:]
        tensors = {name: (t["dtype"], t["shape"], t["data_offsets"]) for name, t in header.items()}
        if zipped:
            width = min(_WIDTHS.get(dtype, 1) for dtype, *_ in tensors.values())
            data = memoryview(np.frombuffer(data, np.uint8).reshape(width, -1).T.tobytes())
        count = int(fields["tokens"])
        agree = {
            "chunk hash": own["chunk_hash"] == key.chunk_hash,
            "tokens": json.loads(own["tokens"]) == json.loads(fields["token_ids"]),
            "positions": own["positions"] == fields["positions"],
            "shapes": len(json.loads(own["tokens"])) == count
            and max(stop for *_, (_, stop) in tensors.values()) == data.nbytes
            and all(t[1][1] == count for name, t in tensors.items() if _LAYER.fullmatch(name)),
            "checksum": own["checksum"] == f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}",
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise BlobError("its blob cannot be read") from None
    if differ := [name for name, same in agree.items() if not same]:
        raise BlobError(f"its blob differs from its key and metadata ({', '.join(differ)})")


def _inflated(blob: memoryview) -> memoryview:
    """A compressed blob as it was, but for the order of the numbers' bytes."""
    import zstandard

    try:
        size = zstandard.frame_content_size(blob)
    except zstandard.ZstdError:
        size = -1
    if not 0 < size <= _MOST_INFLATED:
        raise BlobError("its blob cannot be read")
    return decompress(blob, size, size, 1)


def read_text(inside: Inspection, entry: Listed, tokenizer: Any) -> Inspection:
    """What was found with the text of the chunk's tokens, as its metadata name them.

    Args:
        inside: What was found of the chunk.
        entry: The chunk.
        tokenizer: A Transformers tokenizer.
    """
    said = (entry.metadata or {}).get("token_ids", "")
    if said and not said.startswith("["):
        why = "the text: its token ids are sealed"
    elif (ids := from_text(said)) is None or ids.max() >= len(tokenizer):
        why = "the text: the metadata have no token ids that this tokenizer knows"
    else:
        return replace(inside, text=str(tokenizer.decode(ids.tolist())))
    return replace(inside, unread="; ".join(filter(None, (inside.unread, why))))


def _norms(tensors: dict[str, dict[str, Any]]) -> tuple[Norms, ...]:
    """Of tensors `[kv_heads, tokens, head_dim]` by name, as the library reads them."""
    layers: dict[int, dict[str, float]] = {}
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        # With a size of 0, the others may be as large as a header can write.
        if found and len(tensor["shape"]) == 3 and tensor["data"]:
            numbers = np.frombuffer(tensor["data"], _NUMBERS[tensor["dtype"]])
            if tensor["dtype"] == "BF16":  # the upper half of a float32
                numbers = (numbers.astype("<u4") << 16).view("<f4")
            with np.errstate(all="ignore"):
                heads = numbers.reshape(tensor["shape"]).astype(np.float64)
                length = np.linalg.norm(heads, axis=-1).mean()
            layers.setdefault(int(found[1]), {})[found[2]] = float(length)
    return tuple(
        Norms(layer, parts["keys"], parts["values"])
        for layer, parts in sorted(layers.items())
        if len(parts) == 2
    )
