from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import importlib.util
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
    "order",
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


@pytest.fixture
def untouched() -> ModuleType:
    """The package as it is before anything was asked of it."""
    spec = chunkcache.__spec__
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(package)
    assert not set(PUBLIC) & set(vars(package))
    return package


def test_a_name_is_there_when_it_is_asked_for(untouched: ModuleType) -> None:
    assert set(PUBLIC) <= set(dir(untouched))
    for name in PUBLIC:
        assert getattr(untouched, name) is getattr(chunkcache, name)
    assert inspect.ismodule(untouched.catalog)
    assert inspect.ismodule(untouched.metrics)
    assert untouched.repair is sys.modules["chunkcache.repair"]  # not public, and a module
    with pytest.raises(AttributeError, match="'chunkcache' has no attribute 'RedisCache'"):
        untouched.RedisCache  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'RedisCache'"):
        from chunkcache import RedisCache  # noqa: F401


def test_an_import_that_fails_is_no_missing_name(
    untouched: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(vars(untouched), "prometheus", raising=False)
    for name in [*sys.modules]:  # with those that another test has imported
        if name == "chunkcache.prometheus" or name.startswith("prometheus_client."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match="prometheus_client"):
        untouched.prometheus  # noqa: B018


def test_help_tells_of_the_public_names(untouched: ModuleType) -> None:
    said = pydoc.plain(pydoc.render_doc(untouched))
    assert "class RedisChunkCache(" in said
    assert "open_store(" in said


def test_the_reference_has_the_public_names(untouched: ModuleType) -> None:
    reference = pytest.importorskip("pdoc.doc").Module(untouched)
    assert reference.members["RedisChunkCache"].kind == "class"
    assert reference.members["open_store"].docstring.startswith("Open the store")


def test_type_checkers_see_the_same_names() -> None:
    source = ast.parse(Path(chunkcache.__file__).read_text())
    seen = {
        alias.asname: f"{node.module}.{alias.name}".removeprefix("chunkcache.")
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("chunkcache")
        for alias in node.names
    }
    homes = chunkcache._HOMES
    assert seen == {
        name: home if home.endswith(name) else f"{home}.{name}" for name, home in homes.items()
    }


def test_what_only_looks_into_a_store_needs_no_torch() -> None:
    # Nor numpy: each takes its time to import.
    program = """
import sys
from chunkcache import ChunkCacheError, Settings, StoreError, catalog, open_store
import chunkcache.stores.cluster, chunkcache.stores.disk, chunkcache.stores.embedded_store
import chunkcache.stores.memory, chunkcache.stores.redis, chunkcache.stores.sentinel
Settings.load()
print(sorted({"numpy", "torch", "transformers"} & set(sys.modules)))
import chunkcache.stores.tiered
from chunkcache import Report, metrics
metrics.snapshot()
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["[]", "[]"], done.stderr
