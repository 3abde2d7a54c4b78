"""chunkcache: reuse the K/V of text met before, in HuggingFace Transformers, through Redis.

```python
from chunkcache import RedisChunkCache

cache = RedisChunkCache(model, "redis://localhost:6379/0")
out = model.generate(**inputs, past_key_values=cache)
print(cache.report)
```

Begin with `RedisChunkCache` and its `Report`; `enabled` covers code that calls `generate()` itself,
`open_store` opens a store for several caches, `add_documents` computes documents ahead of time, and
`catalog` and `metrics` tell what a store has and what a process has done.
"""

from chunkcache import metrics
from chunkcache.cache import RedisChunkCache
from chunkcache.enable import Enabled, enabled
from chunkcache.errors import (
    ChunkCacheError,
    SettingError,
    StoreError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from chunkcache.insight.audit import Audit
from chunkcache.insight.explanation import Explanation
from chunkcache.inventory import catalog
from chunkcache.library.documents import DocumentFailure, DocumentsSummary, add_documents
from chunkcache.report import Report
from chunkcache.reuse.prefill import uninstall
from chunkcache.settings import Settings
from chunkcache.stores import open_store

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "ChunkCacheError",
    "DocumentFailure",
    "DocumentsSummary",
    "Enabled",
    "Explanation",
    "RedisChunkCache",
    "Report",
    "SettingError",
    "Settings",
    "StoreError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "add_documents",
    "catalog",
    "enabled",
    "metrics",
    "open_store",
    "uninstall",
]
