from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import pytest
from transformers import DynamicCache

import chunkcache

PUBLIC = [
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


def test_the_public_names() -> None:
    assert sorted(chunkcache.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_are_documented(name: str) -> None:
    public = getattr(chunkcache, name)
    assert inspect.getdoc(public)
    for attribute, member in vars(public).items() if inspect.isclass(public) else ():
        if not attribute.startswith("_") and (
            inspect.isfunction(member) or isinstance(member, property)
        ):
            assert inspect.getdoc(member), f"{name}.{attribute}"


def test_the_cache_is_what_transformers_expects() -> None:
    assert issubclass(chunkcache.RedisChunkCache, DynamicCache)


def test_the_version_is_that_of_the_package() -> None:
    assert chunkcache.__version__ == importlib.metadata.version("chunkcache")


def test_types_are_shipped() -> None:
    assert importlib.resources.files("chunkcache").joinpath("py.typed").is_file()


def test_stores_know_nothing_of_torch_or_transformers() -> None:
    # So that a tool that only looks into a store starts at once.
    code = """
import sys, types
package = types.ModuleType("chunkcache")  # without its __init__, which imports everything
package.__path__ = [PATH]
sys.modules["chunkcache"] = package
import chunkcache.stores, chunkcache.stores.memory, chunkcache.stores.redis, chunkcache.stores.disk
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    path = chunkcache.__path__[0]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("PATH", repr(path))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr
