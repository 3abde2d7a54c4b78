"""chunkcache: reuse the K/V of text met before, in HuggingFace Transformers, through Redis.

```python
from chunkcache import RedisChunkCache

cache = RedisChunkCache(model, "redis://localhost:6379/0")
out = model.generate(**inputs, past_key_values=cache)
print(cache.report)
```

Begin with `RedisChunkCache` and its `Report`; `enabled` covers code that calls `generate()` itself,
`open_store` opens a store for several caches, `add_documents` computes documents ahead of time,
`order` puts them in the order that is known best, and `catalog` and `metrics` tell what a store has
and what a process has done.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names, and the modules that have them. Each module is imported when it is first asked
# for: what only looks into a store starts without torch and Transformers, which take seconds.
_HOMES = {
    "Audit": "insight.audit",
    "ChunkCacheError": "errors",
    "DocumentFailure": "library.documents",
    "DocumentsSummary": "library.documents",
    "Enabled": "enable",
    "Explanation": "insight.explanation",
    "RedisChunkCache": "cache",
    "Report": "report",
    "SettingError": "errors",
    "Settings": "settings",
    "StoreError": "errors",
    "UnsupportedCallError": "errors",
    "UnsupportedModelError": "errors",
    "add_documents": "library.documents",
    "catalog": "inventory.catalog",
    "enabled": "enable",
    "metrics": "metrics",
    "open_store": "stores",
    "order": "library.ordering",
    "uninstall": "reuse.hook",
}

if TYPE_CHECKING:  # the same for type checkers and editors
    from chunkcache import metrics as metrics
    from chunkcache.cache import RedisChunkCache as RedisChunkCache
    from chunkcache.enable import Enabled as Enabled
    from chunkcache.enable import enabled as enabled
    from chunkcache.errors import ChunkCacheError as ChunkCacheError
    from chunkcache.errors import SettingError as SettingError
    from chunkcache.errors import StoreError as StoreError
    from chunkcache.errors import UnsupportedCallError as UnsupportedCallError
    from chunkcache.errors import UnsupportedModelError as UnsupportedModelError
    from chunkcache.insight.audit import Audit as Audit
    from chunkcache.insight.explanation import Explanation as Explanation
    from chunkcache.inventory import catalog as catalog
    from chunkcache.library.documents import DocumentFailure as DocumentFailure
    from chunkcache.library.documents import DocumentsSummary as DocumentsSummary
    from chunkcache.library.documents import add_documents as add_documents
    from chunkcache.library.ordering import order as order
    from chunkcache.report import Report as Report
    from chunkcache.reuse.hook import uninstall as uninstall
    from chunkcache.settings import Settings as Settings
    from chunkcache.stores import open_store as open_store
else:  # which would take any name for a good one, if they saw this

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            # Asked for by `import *`, help() and pdoc, which then look into this module's dict.
            value = [name for name in _HOMES if __getattr__(name)]
        else:
            home = _HOMES.get(name, name)
            try:
                module = import_module(f"{__name__}.{home}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{home}":
                    raise
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
            value = module if home.endswith(name) else getattr(module, name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES, "__all__"})
