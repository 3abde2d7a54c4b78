"""URLs of Redis servers: what they say about hosts and connections, checked before any use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from chunkcache.errors import SettingError
from chunkcache.stores.pool import SoundPool
from chunkcache.stores.wire import CommandPacker, ReplyParser

Hosts = tuple[tuple[str, int], ...]

SERVER = ("redis", "rediss", "unix")
SENTINEL = ("redis+sentinel", "rediss+sentinel")
CLUSTER = ("redis+cluster", "rediss+cluster")
HOW_TO_WRITE = {
    SERVER: "redis://user:password@host:6379/0, rediss://... or unix:///path/of/socket",
    SENTINEL: "redis+sentinel://user:password@host1:26379,host2:26379/service/0",
    CLUSTER: "redis+cluster://user:password@host1:6379,host2:6379",
}

# Clients introduce themselves to the server, which costs two round trips per connection.
# Releases of redis-py before 7.2 cannot be told not to. Over TLS it stays: redis-py takes the
# tickets that come behind the TLS handshake for an unasked reply, unless they are read with one.
QUIET: dict[str, Any] = {"driver_info": None} if find_spec("redis.driver_info") else {}

# What a URL may set. The rest of redis-py's options would change how replies are read.
PARAMETERS = frozenset(
    {
        "client_name",
        "db",
        "health_check_interval",
        "max_connections",
        "password",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_read_size",
        "socket_timeout",
        "username",
    }
)
TLS_PARAMETERS = frozenset(
    {
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    }
)
SENTINEL_PARAMETERS = frozenset({"sentinel_password", "sentinel_username"})


@dataclass(frozen=True)
class Address:
    """Where a store's servers are, and how to connect to one.

    Attributes:
        label: The URL without user, password and query, for messages.
        hosts: Host and port of each server named; none for a Unix socket.
        service: What Sentinel calls the servers.
        options: Arguments of redis-py's connections and their pool, without host and port.
        sentinel_login: User and password for the sentinels themselves.
    """

    label: str
    hosts: Hosts
    service: str
    options: Mapping[str, Any] = field(repr=False)
    sentinel_login: Mapping[str, Any] = field(repr=False)

    @property
    def read_timeout(self) -> float:
        """Seconds that a server may be silent."""
        return float(self.options["socket_timeout"])

    def at(self, host: str, port: int) -> Address:
        """The address of one server of a cluster, connected to in the same way."""
        scheme = self.label.partition("+")[0]
        return replace(self, label=f"{scheme}://{_bracketed(host)}:{port}", hosts=((host, port),))

    def pool(self) -> redis.ConnectionPool:
        """Connections to the first server named; none is made yet."""
        where: dict[str, Any] = {}
        if self.hosts:
            where["host"], where["port"] = self.hosts[0]
        return SoundPool(**self.options, **where)

    def without_secrets(self, text: str) -> str:
        """A message without passwords that a server may have put into it."""
        for options in (self.options, self.sentinel_login):
            for name in ("password", "ssl_password"):
                if secret := options.get(name):
                    text = text.replace(secret, "***")
        return text


def without_password(url: str) -> str:
    """The URL with its password as `***`."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.split(':')[0]}:***@{host}"))


def read_url(
    url: str, schemes: tuple[str, ...], connect_timeout: float, read_timeout: float
) -> Address:
    """Read and check a URL; nothing is connected to.

    `schemes` is `SERVER`, `SENTINEL` or `CLUSTER`. The time-outs (seconds) give way to
    `socket_connect_timeout` and `socket_timeout` in the URL.

    Raises SettingError. Messages about a malformed URL quote nothing of it: a password may stand
    anywhere in it.
    """
    malformed = SettingError(
        f"the store's URL cannot be understood: write {HOW_TO_WRITE[schemes]}, with %-escapes "
        "for special characters in the password (# is %23, / is %2F, @ is %40)"
    )
    try:
        parts = urlsplit(url)
        parts = parts._replace(scheme=re.sub("^valkey", "redis", parts.scheme))
        query = parse_qs(parts.query, keep_blank_values=True)
        login, at, places = parts.netloc.rpartition("@")
        hosts = tuple(_host(place) for place in places.split(",")) if places else ()
    except ValueError:
        raise malformed from None
    if parts.scheme not in schemes or parts.fragment or (schemes is SERVER and len(hosts) > 1):
        raise malformed
    _check_parameters(parts.scheme, query)
    transport, service, path = parts.scheme.partition("+")[0], "", parts.path
    if schemes is SENTINEL:
        service, _, path = path.strip("/").partition("/")
    if transport == "unix":
        if hosts or not path:
            raise SettingError("unix:// store URL: write three slashes, unix:///path/of/socket")
        label = f"unix://{unquote(path)}"
    else:
        port = 26379 if schemes is SENTINEL else 6379
        hosts = tuple((host or "localhost", given or port) for host, given in hosts or (("", 0),))
        database = _check_path(parts.scheme, unquote(service), unquote(path).strip("/"))
        named = [",".join(f"{_bracketed(host)}:{number}" for host, number in hosts)]
        named += [unquote(service)] if service else []
        named += query.get("db", [database or "0"]) if schemes is not CLUSTER else []
        label = f"{parts.scheme}://{'/'.join(named)}"
    ours = {
        "protocol": 2,  # no push messages, which could stand before a reply
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": read_timeout,
        # Once and at once, for a pooled connection that died while idle. Time-outs are not
        # repeated: a silent server costs one.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        "command_packer": CommandPacker(),
        "parser_class": ReplyParser,
        **({} if transport == "rediss" else QUIET),
    }
    try:
        options = ours | parse_url(f"{transport}://{login}{at}/{path.lstrip('/')}?{parts.query}")
        sentinel_login = {
            name.removeprefix("sentinel_"): options.pop(name)
            for name in SENTINEL_PARAMETERS & options.keys()
        }
        pool = redis.ConnectionPool(**options)
        pool.connection_class(**pool.connection_kwargs)  # checks the options, connects nowhere
    except (ValueError, TypeError, redis.RedisError) as error:
        raise SettingError(f"store URL {label}: {error}") from None
    for name in ("socket_connect_timeout", "socket_timeout"):
        if not options[name] > 0:
            raise SettingError(
                f"store URL {label}: {name} (connect_timeout, read_timeout) must be "
                f"more than 0 s, not {options[name]}"
            )
    return Address(label, hosts, unquote(service), options, sentinel_login)


def _host(text: str) -> tuple[str, int]:
    """Host and port, 0 where none is given. Raises ValueError."""
    parts = urlsplit(f"//{text}")
    return parts.hostname or "", parts.port or 0


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _check_parameters(scheme: str, given: Iterable[str]) -> None:
    known = PARAMETERS
    if scheme.startswith("rediss"):
        known |= TLS_PARAMETERS
    if scheme in SENTINEL:
        known |= SENTINEL_PARAMETERS
    if scheme in CLUSTER:
        known -= {"db"}
    if unknown := sorted(set(given) - known):
        # what is no name may be the rest of a password with a ? in it
        name = repr(unknown[0]) if unknown[0].isidentifier() else "after the ?"
        raise SettingError(
            f"{scheme}:// store URL: unknown parameter {name}; known are {', '.join(sorted(known))}"
        )


def _check_path(scheme: str, service: str, database: str) -> str:
    """The number of the database, empty where none is given."""
    if scheme in SENTINEL and not service:
        raise SettingError(
            f"{scheme}:// store URL: name the service that the sentinels watch, such as mymaster: "
            f"{scheme}://host:26379/mymaster/0"
        )
    if scheme in CLUSTER and database.strip("0"):
        raise SettingError(f"{scheme}:// store URL: a cluster has no databases; write no path")
    if database and not database.isdecimal():
        raise SettingError(
            f"{scheme}:// store URL: the path must be the number of a database, such as /0"
        )
    return database
