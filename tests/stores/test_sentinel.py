from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
import torch
from models import tiny, tokens
from scripted import blobs, fetch
from servers import SERVICE, FakeServer, Server, Watched, free_port, redis_binary, wait_until

from chunkcache import RedisChunkCache, open_store
from chunkcache.errors import StoreError
from chunkcache.stores.base import Entry
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.sentinel import SentinelStore
from chunkcache.stores.writer import WriteBehind

PASSWORD = "pass/word#1@2"
ESCAPED = "pass%2Fword%231%402"


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with Watched(PASSWORD) as watched:
        yield watched


def url_of(watched: Watched, service: str = SERVICE, hosts: str = "") -> str:
    return f"redis+sentinel://:{ESCAPED}@{hosts or watched.hosts}/{service}/0"


def entry(key: str, blob: bytes, **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


def read(store: SentinelStore, keys: Sequence[str]) -> list[bytes | None]:
    return blobs(store, *keys)


def use_every_verb(store: SentinelStore) -> None:
    assert store.write([entry("a", b"one", model="m")]) == 3
    assert store.sizes(["a", "none"]) == [3, 0]
    assert read(store, ["a", "none"]) == [b"one", None]
    place = memoryview(bytearray(3))
    assert list(fetch(store, ["a"], [[place]])) == [True]
    assert bytes(place) == b"one"
    assert store.read_metadata(["a"]) == [{"model": "m"}]
    assert store.delete(["a"]) == 1
    store.close()


def test_every_verb_reaches_the_primary(watched: Watched) -> None:
    store = SentinelStore(url_of(watched))
    store.write([entry("k", b"x")])
    with watched.leader.client() as client:
        assert client.get("k@kv_bytes") == b"x"
    use_every_verb(store)


def test_sentinels_that_are_gone_are_passed_over(watched: Watched) -> None:
    hosts = f"127.0.0.1:{free_port()},{watched.hosts}"
    with FakeServer(lambda command: None) as silent:
        address = silent.tcp_url.removeprefix("redis://").removesuffix("/0")
        url = url_of(watched, hosts=f"{address},{hosts}")
        use_every_verb(SentinelStore(f"{url}?socket_connect_timeout=0.1"))


def test_a_service_that_nobody_watches_is_a_store_error(watched: Watched) -> None:
    store = SentinelStore(url_of(watched, "other"))
    with pytest.raises(StoreError, match=r"no sentinel names a primary of 'other'; check"):
        store.sizes(["a"])
    dead = SentinelStore(f"redis+sentinel://127.0.0.1:{free_port()}/{SERVICE}/0")
    for verb in (lambda: dead.sizes(["a"]), lambda: list(fetch(dead, ["a"]))):
        with pytest.raises(StoreError, match="no sentinel names a primary"):
            verb()


def test_silent_sentinels_are_asked_once() -> None:
    asked = []
    with FakeServer(lambda command: asked.append(command[0])) as silent:
        url = silent.tcp_url.replace("redis://", "redis+sentinel://").replace("/0", f"/{SERVICE}/0")
        store = SentinelStore(f"{url}?socket_connect_timeout=0.1")
        with pytest.raises(StoreError):
            store.sizes(["a"])
    assert asked == [b"SENTINEL"]


def test_a_primary_that_steps_down_costs_one_write_at_most(watched: Watched) -> None:
    store = SentinelStore(url_of(watched))
    store.write([entry("a", b"one")])
    old = watched.leader
    with watched.sentinels[0].client() as client:
        client.execute_command("SENTINEL FAILOVER", SERVICE)
    wait_until(lambda: watched.leader is not old)
    with watched.leader.client() as new, old.client() as client:
        # as the sentinels do too, some seconds later
        client.execute_command("REPLICAOF", "127.0.0.1", watched.leader.port)
        try:
            store.write([entry("b", b"two")])
        except StoreError:
            assert store.write([entry("b", b"two")]) == 3
        assert new.get("b@kv_bytes") == b"two"
    assert read(store, ["a", "b"]) == [b"one", b"two"]


def test_prompts_go_on_while_a_primary_dies() -> None:
    """Each prompt is answered as without the cache, and hits come back by themselves."""
    model, ids = tiny("llama"), tokens(300)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)

    def ask() -> RedisChunkCache:
        cache = RedisChunkCache(model, store)
        assert torch.equal(
            model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False), plain
        )
        return cache

    with Watched() as watched:
        store = WriteBehind(CircuitBreaker(SentinelStore(watched.url), cooldown=0.1))
        assert ask().flush(5)
        assert ask().report.reused == 299
        with watched.primary.client() as client:
            assert client.wait(1, 5000) == 1
        watched.primary.stop()
        report = ask().report
        assert report.reused == 0
        assert report.store_errors > 0
        wait_until(lambda: ask().report.reused == 299)
        with watched.replica.client() as client:

            def is_written() -> bool:
                with suppress(StoreError):  # writes have a cool-down of their own
                    store.write([entry("new", b"x")])
                return store.flush(5) and client.get("new@kv_bytes") == b"x"

            wait_until(is_written)


def test_the_password_is_that_of_the_servers_and_never_shown(watched: Watched) -> None:
    url = url_of(watched)
    shown = [repr(SentinelStore(url))]
    for wrong in (watched.url, url.replace(ESCAPED, ESCAPED + "9")):
        with pytest.raises(StoreError, match="password in the store's URL") as caught:
            SentinelStore(wrong).sizes(["a"])
        shown.append(str(caught.value))
    assert not any("pass/word" in text or "pass%2F" in text for text in shown)


def test_sentinels_have_a_login_of_their_own() -> None:
    greetings = []

    def answer(command: list[bytes]) -> bytes:
        greetings.append(command)
        return b"-WRONGPASS no\r\n" if command[0] == b"AUTH" else b"*0\r\n"

    with FakeServer(answer) as fake:
        hosts = fake.tcp_url.removeprefix("redis://").removesuffix("/0")
        url = f"redis+sentinel://me:mine@{hosts}/{SERVICE}/0?sentinel_password=theirs"
        with pytest.raises(StoreError) as caught:
            SentinelStore(url).sizes(["a"])
    assert [b"AUTH", b"theirs"] in [greeting[:1] + greeting[-1:] for greeting in greetings]
    assert "theirs" not in str(caught.value)


def test_a_url_opens_it_behind_a_queue(watched: Watched) -> None:
    with open_store(url_of(watched), ttl=100, refresh_ttl=False) as store:
        store.write([entry("queued", b"blob", a="1")])
        assert store.flush(10)
        assert store.sizes(["queued", "none"]) == [4, 0]
    with watched.leader.client() as client:
        assert 90 < client.ttl("queued@kv_bytes") <= 100


def test_the_database_is_the_number_behind_the_service(watched: Watched) -> None:
    SentinelStore(url_of(watched).removesuffix("/0") + "/3").write([entry("in three", b"x")])
    assert SentinelStore(url_of(watched)).sizes(["in three"]) == [0]


def test_a_plain_server_is_no_sentinel() -> None:
    with Server(redis_binary()) as server:
        url = f"redis+sentinel://127.0.0.1:{server.port}/{SERVICE}/0"
        with pytest.raises(StoreError):
            SentinelStore(url).sizes(["a"])
