"""Doctor: what it finds of real stores, and what it tells."""

from __future__ import annotations

import json

import pytest

from chunkcache import StoreError
from chunkcache.doctor.break_even import BreakEven, Point
from chunkcache.doctor.checks import Health, ModelHealth, examine_stores


def quiet(_: str) -> None:
    """Nobody listens."""


def test_tiers_are_looked_at_one_by_one(redis_server, tmp_path, monkeypatch):
    url = f"memory://?bytes=1GB {tmp_path.as_uri()} {redis_server.unix_url}"
    monkeypatch.setenv("CHUNKCACHE_URL", url)
    found = examine_stores(None, quiet)
    assert [health.url for health in found] == url.split()
    assert [len(health.servers) for health in found] == [0, 0, 1]
    assert found[0].advice == ()
    assert "maxmemory" in found[2].advice[0]
    assert not Health(found).good
    assert Health(found[:2]).good
    assert "  ! maxmemory is not set" in str(Health(found))


def test_a_password_is_not_shown(redis_server):
    client = redis_server.client()
    client.execute_command("ACL", "SETUSER", "ann", "on", ">secret", "~*", "+@all", "-info")
    try:
        found = Health(examine_stores(redis_server.tcp_url.replace("://", "://ann:secret@"), quiet))
    finally:
        client.execute_command("ACL", "DELUSER", "ann")
    assert "secret" not in str(found) + json.dumps(found.to_dict())
    assert "+info" in str(found)
    assert not found.good


def test_a_server_that_is_not_there():
    with pytest.raises(StoreError, match="check that the server runs"):
        examine_stores("redis://localhost:1/0", quiet)


@pytest.mark.parametrize(
    ("read_ms", "good", "said"), [(1.0, True, "from 100 tokens on"), (3.0, False, "never faster")]
)
def test_whether_it_pays(read_ms, good, said):
    measured = BreakEven((Point(100, 2.0, read_ms),))
    found = Health((), ModelHealth("a model", token_bytes=500, break_even=measured))
    assert found.good == good
    assert said in str(found)
    assert found.to_dict()["model"]["break_even"]["prefill_rate"] == 50_000
