"""chunkcache: reuse the K/V of text met before, in HuggingFace Transformers, through Redis."""

from chunkcache.cache import RedisChunkCache
from chunkcache.errors import (
    ChunkCacheError,
    SettingError,
    StoreError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from chunkcache.prefill import uninstall
from chunkcache.report import Report
from chunkcache.settings import Settings
from chunkcache.stores import open_store

__version__ = "0.1.0"

__all__ = [
    "ChunkCacheError",
    "RedisChunkCache",
    "Report",
    "SettingError",
    "Settings",
    "StoreError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "open_store",
    "uninstall",
]
