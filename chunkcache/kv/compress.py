"""Lossless compression of blobs with zstd (RFC 8878), for links slower than compressing is.

Of numbers, sign and exponent repeat and mantissas do not, so their bytes are sorted by significance
first: K/V shrink by a fifth to a third then, instead of by a tenth to a fifth.
"""

from __future__ import annotations

import numpy as np

from chunkcache.errors import BlobError

_LEVEL = 1  # higher ones gain little on K/V and cost much


def most_bytes(size: int) -> int:
    """How large zstd can make so many bytes: `ZSTD_COMPRESSBOUND`, rounded up."""
    return size + size // 256 + 64


def compress(blob: memoryview, head: int, width: int) -> memoryview:
    """Compress a blob whose numbers, `width` bytes each, begin behind `head` bytes."""
    import zstandard

    shuffled = bytearray(blob)
    numbers = np.frombuffer(shuffled, dtype=np.uint8)[head:]
    numbers.reshape(width, -1)[:] = np.frombuffer(blob, dtype=np.uint8)[head:].reshape(-1, width).T
    return memoryview(zstandard.ZstdCompressor(_LEVEL).compress(shuffled))


def decompress(packed: memoryview, size: int, head: int, width: int) -> memoryview:
    """The blob of `size` bytes that was compressed, in writable memory. No more is ever allocated.

    Raises:
        BlobError: It is something else.
    """
    import zstandard

    try:
        # A frame may claim any size, and that much would be allocated.
        if zstandard.frame_content_size(packed) != size:
            raise BlobError("the blob is damaged: its length is wrong")
        shuffled = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BlobError(f"the blob is damaged: {error}") from error
    blob = bytearray(shuffled)
    numbers = np.frombuffer(blob, dtype=np.uint8)[head:]
    numbers.reshape(-1, width)[:] = (
        np.frombuffer(shuffled, dtype=np.uint8)[head:].reshape(width, -1).T
    )
    return memoryview(blob)
