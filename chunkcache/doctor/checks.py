"""Doctor: is the store well? And what is told of it, and of a model that `trial` has tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chunkcache.errors import StoreError
from chunkcache.settings import Settings
from chunkcache.stores import named_urls, open_store
from chunkcache.stores.address import without_password
from chunkcache.stores.base import ChunkStore
from chunkcache.stores.health import Server, Speed, measure_speed, read_info

if TYPE_CHECKING:
    from chunkcache.doctor.break_even import BreakEven

Step = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """One store, or one tier.

    Attributes:
        url: Its URL, without a password.
        servers: The servers behind it, as far as they tell.
        speed: What was measured.
        advice: What should be changed, and how.
    """

    url: str
    servers: tuple[Server, ...]
    speed: Speed
    advice: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"store {self.url}"]
        for server in self.servers:
            bound = f"{server.max_memory / 1e9:.1f} GB" if server.max_memory else "no bound"
            lines.append(
                f"  {server.product}, {server.memory / 1e9:.2f} GB in use of {bound}, "
                f"{server.policy}, persistence: {server.persistence}"
            )
        speed = self.speed
        lines.append(
            f"  a lookup takes {speed.round_trip_ms:.2f} ms, writes {speed.write / 1e6:,.0f} MB/s, "
            f"reads {speed.read / 1e6:,.0f} MB/s"
        )
        return "\n".join([*lines, *(f"  ! {said}" for said in self.advice)])


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """What can be done with a model.

    Attributes:
        name: Its name.
        dtype: Data type of its K/V.
        bypass_reason: Why its K/V cannot be reused, or `""`.
        moving: Why they cannot be moved (`reuse="anywhere"`), or `""`.
        token_bytes: Bytes of K/V per token, as the codec stores them.
        state_bytes: Bytes of a snapshot of recurrent and convolution states, 0 without any.
        state_every: Tokens between snapshots.
        break_even: What was measured, if they can be reused.
        note: What may be made faster on this machine, or `""`.
    """

    name: str
    dtype: str = ""
    bypass_reason: str = ""
    moving: str = ""
    token_bytes: float = 0.0
    state_bytes: int = 0
    state_every: int = 0
    break_even: BreakEven | None = None
    note: str = ""

    def __str__(self) -> str:
        lines = [f"model {self.name}"]
        if self.bypass_reason:
            return "\n".join([*lines, f"  ! falls back to normal prefill: {self.bypass_reason}"])
        can = "can be moved, too" if not self.moving else f"cannot be moved: {self.moving}"
        lines.append(
            f"  K/V are {self.dtype}, {self.token_bytes:,.0f} bytes per token in the store: 1 GB "
            f"holds {1e9 / self.token_bytes:,.0f} tokens"
        )
        if self.state_bytes:
            lines.append(
                f"  a snapshot of its states has {self.state_bytes:,} bytes, as K/V of "
                f"{self.state_bytes / self.token_bytes:,.0f} tokens; there is one every "
                f"{self.state_every:,} tokens, and shortly before a prompt's end"
            )
        lines.append(f"  what stands at the beginning of a prompt is reused; K/V {can}")
        if self.break_even and self.break_even.points:
            measured = self.break_even
            lines.append(f"  computes {measured.prefill_rate:,.0f} tokens/s")
            lines += [
                f"  {point.tokens:>6,} tokens: {point.compute_ms:>9,.1f} ms to compute, "
                f"{point.read_ms:>9,.1f} ms to read"
                for point in measured.points
            ]
            lines.append(
                f"  reading is faster from {measured.from_tokens:,} tokens on"
                if measured.from_tokens
                else "  ! reading was never faster than computing: this store is too slow for this "
                "model; use a nearer one, such as memory:// or unix://, or no cache"
            )
        elif self.break_even:
            lines.append(
                "  ! too short to measure: the model has no positions for a chunk and a token "
                "behind it; make CHUNKCACHE_CHUNK_SIZE smaller"
            )
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Health:
    """All that was found."""

    stores: tuple[StoreHealth, ...]
    model: ModelHealth | None = None

    @property
    def good(self) -> bool:
        """Whether there is nothing to change."""
        measured = self.model and self.model.break_even
        pays = self.model is None or bool(measured and measured.from_tokens)
        return pays and not any(store.advice for store in self.stores)

    def to_dict(self) -> dict[str, Any]:
        """All that was found, ready for JSON."""
        told = {"good": self.good, **asdict(self)}
        if self.model and (measured := self.model.break_even):
            told["model"]["break_even"] |= {
                "from_tokens": measured.from_tokens,
                "prefill_rate": measured.prefill_rate if measured.points else None,
            }
        return told

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.stores, *([self.model] if self.model else [])]))


def open_for_measuring(url: str | None) -> ChunkStore:
    """The store with the settings in force: another `ttl` would expire what others have stored."""
    return open_store(url, **Settings.load().of_store)


def examine_stores(url: str | None, step: Step) -> tuple[StoreHealth, ...]:
    """Look at the store, or at each of its tiers by itself.

    Args:
        url: As in `open_store`.
        step: Told what is being done.

    Raises:
        SettingError: The URL cannot work.
        StoreError: A store does not answer, or does not keep what it is given.
    """
    settings = Settings.load()
    found = []
    for each in named_urls(url) or [""]:  # the embedded one
        shown = without_password(each or "embedded://")
        step(f"measuring {shown}")
        with open_for_measuring(each) as store:
            found.append(_examine_store(shown, store, settings.ttl))
    return tuple(found)


def _examine_store(shown: str, store: ChunkStore, ttl: float) -> StoreHealth:
    speed = measure_speed(store)
    try:
        is_ours = shown.startswith("embedded:")
        servers = tuple(read_info(info, ttl, is_ours) for info in store.server_info())
    except StoreError as error:
        why = f"the server tells nothing of itself; allow its account INFO (+info): {error}"
        return StoreHealth(shown, (), speed, (why,))
    advice = dict.fromkeys(said for server in servers for said in server.advice)
    return StoreHealth(shown, servers, speed, tuple(advice))
