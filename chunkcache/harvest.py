"""From the layers into the store: chunks that are complete and not there yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from chunkcache.chunking import Chunk
from chunkcache.codec import FORMAT, BlobForm, KVLayout, encode
from chunkcache.identity import ModelIdentity
from chunkcache.layers import row_slice
from chunkcache.settings import Settings
from chunkcache.stores.base import Entry


def harvest(
    layers: Sequence[Any],
    layout: KVLayout,
    ids: Tensor,
    pads: Sequence[int],
    rows: Sequence[list[Chunk]],
    known: set[str],
    identity: ModelIdentity,
    settings: Settings,
) -> list[Entry]:
    """Entries for all chunks of all rows that are not known yet; they become known.

    Args:
        layers: Cache layers that hold the K/V of `ids`.
        layout: What they cache.
        ids: `[batch, columns]` token ids, on the CPU.
        pads: Columns of left padding of each row.
        rows: Chunks of each row that may be kept.
        known: Hashes that are in the store or on their way there.
        identity: The model that computed them.
        settings: Namespace and tags for the metadata.
    """
    entries = []
    for row, (chunks, pad) in enumerate(zip(rows, pads, strict=True)):
        for chunk in chunks:
            if chunk.hash in known:
                continue
            known.add(chunk.hash)
            start, stop = pad + chunk.start, pad + chunk.stop
            form = BlobForm.of(layout, ids[row, start:stop].tolist(), chunk.start, chunk.hash)
            blob = encode(form, row_slice(layers, row, start, stop))
            metadata = _metadata(chunk, blob.nbytes, layout, identity, settings)
            entries.append(Entry(str(identity.key(chunk.hash, FORMAT)), metadata, blob))
    return entries


def _metadata(
    chunk: Chunk, size: int, layout: KVLayout, identity: ModelIdentity, settings: Settings
) -> dict[str, str]:
    """What `HGETALL` shows to a person. Nothing here is needed to read the blob."""
    return {
        "model": identity.name,
        "revision": identity.revision,
        "identity": identity.digest,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "codec": FORMAT,
        "tokens": str(chunk.stop - chunk.start),
        "positions": f"{chunk.start}-{chunk.stop}",
        "layers": str(len(layout.layers)),
        "bytes": str(size),
        "namespace": settings.namespace,
        "tags": settings.tags,
        "created": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    }
