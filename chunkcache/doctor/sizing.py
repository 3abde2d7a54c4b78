"""Sizing: how much memory, network and how many servers a load needs. Arithmetic only.

Every formula is explained in docs/sizing.md, under the names used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from chunkcache.errors import SettingError

# What one chunk takes beside its blob, measured on Redis 7.0 and Valkey 9.1 with MEMORY USAGE:
# its metadata, and with reuse="anywhere" the index entries that lead to it.
METADATA_BYTES = 2_000
INDEX_BYTES = 10_000
# The rest is for replies under way, fragmentation, and text that nobody asks for again.
USABLE_MEMORY = 0.8
USABLE_LINK = 0.7
# What is beyond these is a slip, and could not be multiplied.
LEAST, MOST = 1e-9, 1e24


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a store.

    Attributes:
        corpus_tokens: Tokens whose K/V are to be kept.
        prompts_per_second: How many prompts come.
        prompt_tokens: Tokens of a prompt.
        reused: Share of them that is found, 0 to 1.

    Raises:
        SettingError: A number that cannot be.
    """

    corpus_tokens: float
    prompts_per_second: float = 1.0
    prompt_tokens: float = 4_000.0
    reused: float = 0.9

    def __post_init__(self) -> None:
        for name in ("corpus_tokens", "prompts_per_second", "prompt_tokens"):
            _positive(name, getattr(self, name))
        if not 0 <= self.reused <= 1:
            raise SettingError(f"reused={self.reused} must be a share between 0 and 1, such as 0.9")


@dataclass(frozen=True, slots=True)
class Node:
    """One server of the store.

    Attributes:
        memory: Bytes of its RAM.
        link: Bits per second of its network.

    Raises:
        SettingError: A number that cannot be.
    """

    memory: float = 64e9
    link: float = 10e9

    def __post_init__(self) -> None:
        _positive("node memory", self.memory)
        _positive("node link", self.link)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the load needs.

    Attributes:
        token_bytes: Bytes of a blob per token, its header included.
        memory: Bytes of RAM for the corpus, all servers together.
        read: Bytes per second that are read from the store.
        write: Bytes per second that are written to it.
        read_seconds: Time that the reused part of a prompt takes on the link of one server.
        nodes_for_memory: Servers that the memory needs.
        nodes_for_network: Servers that the network needs.
        compute_seconds: Time that computing it would take; `None` if the speed is not known.
        break_even_link: Bits per second above which reading is faster than computing; likewise.
    """

    token_bytes: float
    memory: float
    read: float
    write: float
    read_seconds: float
    nodes_for_memory: int
    nodes_for_network: int
    compute_seconds: float | None
    break_even_link: float | None

    @property
    def nodes(self) -> int:
        """Servers in all."""
        return max(self.nodes_for_memory, self.nodes_for_network)


def plan(
    chunk_bytes: float,
    chunk_tokens: int,
    load: Load,
    node: Node,
    *,
    prefill_rate: float | None = None,
    anywhere: bool = False,
) -> Plan:
    """What a load needs.

    Args:
        chunk_bytes: Bytes of one blob.
        chunk_tokens: Tokens in it.
        load: What is asked.
        node: One server.
        prefill_rate: Tokens per second that the model computes.
        anywhere: Whether the index of `reuse="anywhere"` is kept too.

    Raises:
        SettingError: A number that cannot be.
    """
    _positive("chunk_bytes", chunk_bytes)
    _positive("chunk_tokens", chunk_tokens)
    if prefill_rate is not None:
        _positive("prefill rate", prefill_rate)
    token_bytes = chunk_bytes / chunk_tokens
    beside = METADATA_BYTES + (INDEX_BYTES if anywhere else 0)
    memory = math.ceil(load.corpus_tokens / chunk_tokens) * (allocated(chunk_bytes) + beside)
    found = load.prompt_tokens * load.reused
    read = load.prompts_per_second * found * token_bytes
    write = load.prompts_per_second * (load.prompt_tokens - found) * token_bytes
    busiest = 8 * max(read, write)  # a link carries as much in each direction at once
    return Plan(
        token_bytes,
        memory,
        read,
        write,
        8 * found * token_bytes / node.link,
        max(1, math.ceil(memory / (USABLE_MEMORY * node.memory))),
        max(1, math.ceil(busiest / (USABLE_LINK * node.link))),
        found / prefill_rate if prefill_rate else None,
        8 * token_bytes * prefill_rate if prefill_rate else None,
    )


def allocated(nbytes: float) -> float:
    """Bytes that Redis' allocator (jemalloc) takes for a value of so many bytes.

    Sizes above 16 KiB are rounded up to the next of four steps between powers of two, by a quarter
    at most. Valkey 9 takes no more than the value's size.
    https://jemalloc.net/jemalloc.3.html, "Size classes".
    """
    if nbytes <= 1 << 14:
        return nbytes
    step = 2.0 ** (math.ceil(math.log2(nbytes)) - 3)
    return math.ceil(nbytes / step) * step


def _positive(name: str, value: float) -> None:
    if not LEAST <= value <= MOST:
        raise SettingError(
            f"{name}={value} must be a number above 0, between {LEAST:g} and {MOST:g}"
        )
