"""From the layers into the store: chunks that are complete and not there yet."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from chunkcache.chunking import Chunk
from chunkcache.codec import BlobForm, KVLayout, encode
from chunkcache.layers import row_slice
from chunkcache.relocate import Origin, index_entries
from chunkcache.settings import Settings
from chunkcache.stores.base import Entry


def harvest(
    layers: Sequence[Any],
    layout: KVLayout,
    ids: Tensor,
    pads: Sequence[int],
    rows: Sequence[list[Chunk]],
    known: set[str],
    origin: Origin,
    settings: Settings,
    context: str = "exact",
) -> list[Entry]:
    """Entries for all chunks of all rows that are not known yet; they become known.

    Args:
        layers: Cache layers that hold the K/V of `ids`.
        layout: What they cache.
        ids: `[batch, columns]` token ids, on the CPU.
        pads: Columns of left padding of each row.
        rows: Chunks of each row that may be kept.
        known: Hashes that are in the store or on their way there.
        origin: Store and model that they are of.
        settings: Namespace and tags for the metadata, and whether chunks are to be found anywhere.
        context: Whether the K/V are those of their prefix, `"exact"`, or were computed behind moved
            ones, `"approximate"`.
    """
    entries = []
    for row, (chunks, pad) in enumerate(zip(rows, pads, strict=True)):
        for before, chunk in zip([None, *chunks], chunks, strict=False):
            if chunk.hash in known:
                continue
            known.add(chunk.hash)
            start, stop = pad + chunk.start, pad + chunk.stop
            tokens = ids[row, start:stop]
            form = BlobForm.of(layout, tokens.tolist(), chunk.start, chunk.hash)
            blob = encode(form, row_slice(layers, row, start, stop))
            follows = before is not None and before.stop == chunk.start
            metadata = {
                "model": origin.identity.name,
                "revision": origin.identity.revision,
                "identity": origin.identity.digest,
                "dtype": str(layout.dtype).removeprefix("torch."),
                "codec": origin.format,
                "tokens": str(chunk.stop - chunk.start),
                "token_ids": json.dumps(tokens.tolist(), separators=(",", ":")),
                "positions": f"{chunk.start}-{chunk.stop}",
                "layers": str(len(layout.layers)),
                "bytes": str(blob.nbytes),
                "namespace": settings.namespace,
                "tags": settings.tags,
                "context": context,
                "parent": before.hash if before is not None and follows else "",
                "created": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
            }
            entries.append(Entry(origin.key(chunk.hash), metadata, blob))
            if settings.reuse == "anywhere":
                entries += index_entries(origin, chunk, ids[row, pad:].numpy(), metadata["created"])
    return entries
