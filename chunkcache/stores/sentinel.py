"""Chunks on whichever server Sentinel says is the primary."""

from __future__ import annotations

from typing import Any, ClassVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from chunkcache.stores.address import QUIET, SENTINEL, Address
from chunkcache.stores.pool import SoundSentinelPool
from chunkcache.stores.redis import RedisStore


class SentinelStore(RedisStore):
    """A store on the primary of a service that Sentinel watches.

    `url` is `redis+sentinel://user:password@host1:26379,host2:26379/service/0`, `rediss+sentinel://`
    for TLS. User and password are those of the servers; `sentinel_username` and
    `sentinel_password` in the URL are those of the sentinels. The other arguments are those of
    `RedisStore`.

    Each new connection asks the sentinels, one after the other, so after a fail-over the next
    call goes to the new primary; until there is one, calls raise StoreError.
    """

    schemes: ClassVar[tuple[str, ...]] = SENTINEL

    def _pool(self, address: Address) -> redis.ConnectionPool:
        options = dict(address.options)
        tls = options.pop("connection_class", None) is not None
        shared = {name: options[name] for name in options if name.startswith(("ssl_", "socket_"))}
        sentinels = _Sentinels(  # type: ignore[no-untyped-call]
            address.hosts,
            sentinel_kwargs={
                **shared,
                **address.sentinel_login,
                "ssl": tls,
                "protocol": 2,
                **({} if tls else QUIET),
                # A sentinel that is busy for longer than a connection takes is passed over.
                "socket_timeout": options["socket_connect_timeout"],
                "retry": Retry(NoBackoff(), 0),  # the next one is asked instead
            },
        )
        options["connection_class"] = (
            SentinelManagedSSLConnection if tls else SentinelManagedConnection
        )
        return SoundSentinelPool(  # type: ignore[no-untyped-call]
            address.service, sentinels, **options
        )


class _Sentinels(Sentinel):
    """redis-py's client of all sentinels, but not asked again when none names a primary.

    Connections repeat what fails with a ConnectionError, such as MasterNotFoundError, and with it
    the wait for all sentinels.
    """

    def discover_master(self, service_name: str) -> Any:
        try:
            return super().discover_master(service_name)  # type: ignore[no-untyped-call]
        except MasterNotFoundError:
            raise redis.RedisError(
                f"no sentinel names a primary of {service_name!r}; check that the sentinels and a "
                "primary run, and the name of the service in the store's URL"
            ) from None
