"""Health: what real servers tell, what is measured, and what is advised."""

from __future__ import annotations

import pytest
from servers import Cluster, Server, redis_binary

from chunkcache import StoreError, open_store
from chunkcache.stores.health import BLOB_BYTES, BLOBS, measure_speed, read_info
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore

GOOD = {
    "redis_version": "7.0.15",
    "used_memory": 10,
    "maxmemory": 100,
    "maxmemory_policy": "allkeys-lru",
    "aof_enabled": 0,
    "rdb_last_bgsave_status": "ok",
    "role": "master",
    "loading": 0,
    "save": "",
}


def test_speed(server):
    with open_store(server.unix_url) as store:
        speed = measure_speed(store)
    assert speed.round_trip_ms > 0
    assert min(speed.write, speed.read) > 1e6
    assert server.client().dbsize() == 0


def test_speed_of_files_and_memory(tmp_path):
    for url in (tmp_path.as_uri(), "memory://"):
        with open_store(url) as store:
            assert measure_speed(store).read > 1e6
            assert list(store.scan()) == []


@pytest.mark.parametrize("policy", ["allkeys-lru", "noeviction"])
def test_a_store_that_is_too_small(policy):
    options = ("--maxmemory", str(BLOBS * BLOB_BYTES // 2), "--maxmemory-policy", policy)
    with Server(redis_binary(), *options) as server, open_store(server.unix_url, ttl=60) as store:
        with pytest.raises(StoreError, match=r"maxmemory|make it larger"):
            measure_speed(store)
        # What a full server does not let us delete will expire.
        assert all(server.client().ttl(key) > 0 for key in server.client().scan_iter())


def test_a_store_that_gives_back_something_else(scripted):
    def zeros(number, part, there):
        part.place[0][:] = bytes(BLOB_BYTES)

    scripted.answer = zeros
    with pytest.raises(StoreError, match="other bytes"):
        measure_speed(scripted)


def test_what_servers_say(server):
    with open_store([server.unix_url, "memory://"]) as store:
        (info,) = store.server_info()
    told = read_info(info)
    version = server.client().info().get("valkey_version")
    assert told.product.startswith(f"Valkey {version}" if version else "Redis ")
    assert told.memory > 0
    assert told.persistence == "none"
    assert told.advice == (next(iter(told.advice)),)
    assert "CONFIG SET maxmemory 16gb" in told.advice[0]


def test_a_server_set_up_well():
    options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with Server(redis_binary(), *options) as server, RedisStore(server.unix_url) as store:
        assert read_info(store.server_info()[0]).advice == ()
        server.client().config_set("save", "3600 1")
        server.client().config_set("appendonly", "yes")
        told = read_info(store.server_info()[0])
        own = read_info(store.server_info()[0], is_ours=True)
    assert told.persistence == "snapshots and append-only file"
    assert "snapshots" in told.advice[0]
    assert own.advice == ()


def test_an_account_that_may_not_ask(redis_server):
    client = redis_server.client()
    client.execute_command("ACL", "SETUSER", "ann", "on", "nopass", "~*", "+@all", "-config")
    try:
        url = redis_server.tcp_url.replace("://", "://ann:x@")
        with RedisStore(url) as store:
            assert read_info(store.server_info()[0]).persistence == "unknown"
        client.execute_command("ACL", "SETUSER", "ann", "-info")
        with RedisStore(url) as store, pytest.raises(StoreError, match="info"):
            store.server_info()
    finally:
        client.execute_command("ACL", "DELUSER", "ann")


def test_each_server_of_a_cluster_is_asked():
    with Cluster() as cluster, open_store(cluster.url) as store:
        assert len(store.server_info()) == 3
        cluster.reset()


def test_stores_without_a_server(tmp_path):
    with open_store(tmp_path.as_uri()) as store, TieredStore([store]) as tiers:
        assert tiers.server_info() == []


@pytest.mark.parametrize(
    ("change", "ttl", "advice"),
    [
        ({}, 0, ""),
        ({"maxmemory": 0}, 0, "maxmemory is not set"),
        ({"maxmemory_policy": "noeviction"}, 60, "nothing new is kept"),
        ({"maxmemory_policy": "noeviction", "used_memory": 95}, 0, "95% are in use"),
        ({"maxmemory_policy": "volatile-lru"}, 0, "and no ttl"),
        ({"maxmemory_policy": "volatile-lru"}, 60, ""),
        ({"maxmemory_policy": "allkeys-random"}, 0, "may leave"),
        ({"role": "slave"}, 0, "primary"),
        ({"loading": 1}, 0, "wait"),
        ({"rdb_last_bgsave_status": "err"}, 0, "disk space"),
        ({"save": "3600 1"}, 0, "snapshots"),
    ],
)
def test_advice(change, ttl, advice):
    said = read_info(GOOD | change, ttl).advice
    assert len(said) == bool(advice)
    assert advice in "".join(said)
