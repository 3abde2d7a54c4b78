from __future__ import annotations

import pytest
from redis.connection import SSLConnection, UnixDomainSocketConnection

from chunkcache.errors import SettingError
from chunkcache.stores.address import CLUSTER, SENTINEL, SERVER, Address, read_url, without_password

KINDS = {scheme: schemes for schemes in (SERVER, SENTINEL, CLUSTER) for scheme in schemes}


def address_of(url: str) -> Address:
    schemes = KINDS.get(url.partition(":")[0], SERVER)
    return read_url(url, schemes, connect_timeout=0.25, read_timeout=2.0)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("localhost:6379", "write redis://user:password@host:6379/0, rediss://"),
        ("http://localhost", "cannot be understood"),
        ("redis://host:port/0", "cannot be understood"),
        ("redis://host:66666/0", "cannot be understood"),
        ("redis://[::1/0", "cannot be understood"),
        ("redis://one:1,two:2/0", "cannot be understood"),
        ("redis://host:6379/zero", "number of a database"),
        ("redis://host/0?protocol=3", "unknown parameter 'protocol'"),
        ("redis://host/0?ssl_ca_certs=x", "unknown parameter 'ssl_ca_certs'"),
        ("redis://host/0?decode_responses=yes", "known are client_name, db"),
        ("redis://host/0?sentinel_password=x", "unknown parameter 'sentinel_password'"),
        ("redis://host/0?socket_timeout=soon", "socket_timeout"),
        ("redis://host/0?socket_timeout=0", "more than 0 s"),
        ("redis://host/0?socket_connect_timeout=-1", "more than 0 s"),
        ("redis://host/0?db=one", "db"),
        ("redis://host/0?max_connections=-1", "max_connections"),
        ("rediss://host/0?ssl_cert_reqs=perhaps", "rediss://host:6379/0"),
        ("unix://relative/path", "three slashes"),
        ("unix://", "three slashes"),
        ("redis+sentinel://host:x/s/0", "write redis\\+sentinel://user:password@host1:26379,"),
        ("redis+sentinel://host", "name the service that the sentinels watch, such as mymaster"),
        ("redis+sentinel://host/", "name the service"),
        ("redis+sentinel://host/service/zero", "number of a database"),
        ("redis+sentinel://host/service/0?ssl_ca_certs=x", "unknown parameter 'ssl_ca_certs'"),
        ("redis+cluster://host:1,host:x", "write redis\\+cluster://user:password@host1:6379,"),
        ("redis+cluster://host/1", "a cluster has no databases"),
        ("redis+cluster://host/one", "a cluster has no databases"),
        ("redis+cluster://host?db=0", "unknown parameter 'db'"),
    ],
)
def test_a_malformed_url_is_a_setting_error(url: str, hint: str) -> None:
    with pytest.raises(SettingError, match=hint):
        address_of(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:se/cret@host:6379/0",
        "redis://user:se#cret@host:6379/0",
        "redis://user:secret@host:six/0",
        "redis://user:se?cret@host:6379/0",
        "redis://user:1?secret@host:6379/0",
        "redis://user:1/secret@host:6379/0",
        "redis://user:1#secret@host:6379/0",
        "redis://user:secret@host/0?nonsense=1",
        "redis://user:secret@host/zero",
        "redis://user:secret@host/0?socket_timeout=soon",
        "unix://user:secret@host/path",
        "http://user:secret@host",
        "redis://host/0?password=secret&db=x",
        "redis+sentinel://user:secret@host",
        "redis+sentinel://user:se/cret@host/service/0",
        "redis+sentinel://host/service/0?sentinel_password=secret&db=x",
        "redis+cluster://user:secret@host/1",
        "redis+cluster://user:1/secret@host,other",
    ],
)
def test_a_malformed_url_does_not_show_its_password(url: str) -> None:
    with pytest.raises(SettingError) as caught:
        address_of(url)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "label", "hosts"),
    [
        ("redis://user:secret@host:1/5", "redis://host:1/5", [("host", 1)]),
        ("redis://", "redis://localhost:6379/0", [("localhost", 6379)]),
        ("rediss://:secret@[::1]:7?ssl_cert_reqs=none&db=3", "rediss://[::1]:7/3", [("::1", 7)]),
        ("unix:///a/b%20c?password=secret", "unix:///a/b c", []),
        (
            "redis+sentinel://user:secret@one:1,two,[::1]:3/my%20service/5?sentinel_password=x",
            "redis+sentinel://one:1,two:26379,[::1]:3/my service/5",
            [("one", 1), ("two", 26379), ("::1", 3)],
        ),
        ("rediss+sentinel://one/s", "rediss+sentinel://one:26379/s/0", [("one", 26379)]),
        (
            "redis+cluster://user:secret@one:1,two/",
            "redis+cluster://one:1,two:6379",
            [("one", 1), ("two", 6379)],
        ),
        ("rediss+cluster:///0", "rediss+cluster://localhost:6379", [("localhost", 6379)]),
    ],
)
def test_an_address_is_shown_without_its_secrets(
    url: str, label: str, hosts: list[tuple[str, int]]
) -> None:
    address = address_of(url)
    assert (address.label, list(address.hosts)) == (label, hosts)
    assert "secret" not in repr(address)


def test_login_database_and_time_outs_reach_the_connections() -> None:
    address = address_of(
        "redis+sentinel://me:p%2Fw%40@host/s/5?sentinel_username=them&sentinel_password=q"
        "&socket_timeout=7"
    )
    options = address.options
    assert (options["username"], options["password"], options["db"]) == ("me", "p/w@", 5)
    assert (options["socket_connect_timeout"], address.read_timeout) == (0.25, 7.0)
    assert address.sentinel_login == {"username": "them", "password": "q"}
    assert address.service == "s"
    assert address.without_secrets("p/w@ and q") == "*** and ***"


@pytest.mark.parametrize("scheme", CLUSTER)
def test_one_server_of_a_cluster_is_connected_to_in_the_same_way(scheme: str) -> None:
    address = address_of(f"{scheme}://me:secret@one:1?client_name=x").at("::2", 2)
    pool = address.pool()
    transport = scheme.removesuffix("+cluster")
    assert address.label == f"{transport}://[::2]:2"
    assert (pool.connection_kwargs["host"], pool.connection_kwargs["port"]) == ("::2", 2)
    assert pool.connection_kwargs["password"] == "secret"
    assert pool.connection_kwargs["client_name"] == "x"
    assert issubclass(pool.connection_class, SSLConnection) == (transport == "rediss")


def test_a_socket_has_no_host() -> None:
    pool = address_of("unix://me:secret@/a/b?db=3").pool()
    assert pool.connection_class is UnixDomainSocketConnection
    assert pool.connection_kwargs["path"] == "/a/b"
    assert "host" not in pool.connection_kwargs


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@localhost:6379/0", "redis://:***@localhost:6379/0"),
        ("rediss://ann:s:e@c@host/2?x=1", "rediss://ann:***@host/2?x=1"),
        ("unix://:secret@/run/redis.sock", "unix://:***@/run/redis.sock"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_urls_are_shown_without_their_password(url: str, shown: str) -> None:
    assert without_password(url) == shown
