"""The exceptions a user can meet. Each message names what is at fault and its remedy."""

from typing import Self


class ChunkCacheError(Exception):
    """Base of all errors raised by chunkcache. `cause` is one word for it, for counting."""

    cause = "other"


class SettingError(ChunkCacheError, ValueError):
    """A setting, URL or argument has a value that cannot work."""


class UnsupportedModelError(ChunkCacheError, TypeError):
    """The model has no K/V cache that could be filled (encoder-decoder, a cache of its own)."""


class UnsupportedCallError(ChunkCacheError, ValueError):
    """The call contradicts the use of a cache (for instance `use_cache=False`)."""


class PickleError(ChunkCacheError, TypeError):
    """A cache or a store cannot be sent to another process; its URL can."""

    @classmethod
    def of(cls, thing: object) -> Self:
        """The error for a cache or store that was to be pickled."""
        return cls(
            f"a {type(thing).__name__} cannot be pickled, as it holds connections, threads or the "
            "memory of this process: pass the store's URL to the other process, and call "
            "RedisChunkCache(model, url) or open_store(url) there"
        )


class StoreError(ChunkCacheError):
    """A store could not be reached or answered with an error. Raised to users only on request.

    `cause` is `"connection"`, `"timeout"`, `"authentication"`, `"full"`, `"read_only"`,
    `"wrong_url"`, `"server"` (any other error of a server), `"disk"`, `"circuit_open"` (it failed
    before, and was not asked) or `"other"`.
    """

    def __init__(self, message: str, cause: str = "other") -> None:
        super().__init__(message)
        self.cause = cause


class BlobError(ChunkCacheError):
    """A blob is damaged, or is not the chunk it should be. Treated as a miss."""

    cause = "damaged"


class SealedBlobError(BlobError):
    """A blob is sealed with a key that is not ours. A miss; it is left to those who can open it."""

    cause = "sealed"


class RepairError(ChunkCacheError):
    """A repair strategy could not look at this model. Reported; a simpler one is used."""

    cause = "repair"
