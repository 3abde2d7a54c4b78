"""Does the simulated device find out what a real one would do wrong?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import fakegpu

GPU = torch.get_device_module(fakegpu.NAME)
BLOBS = [torch.randn(4, 2, 2, 8, 4, generator=torch.Generator().manual_seed(n)) for n in range(6)]


def through_a_ring(wait_for_copy: bool = True, wait_for_slot: bool = True) -> Tensor:
    """Blobs by way of two pinned buffers and a stream of their own, into one tensor."""
    arena = torch.empty(4, 2, 2, 48, 4, device=fakegpu.NAME)
    ring, free = [torch.zeros(4, 2, 2, 8, 4).pin_memory() for _ in range(2)], [None, None]
    side, arrived = GPU.Stream(), []
    for number, blob in enumerate(BLOBS):
        slot = number % 2
        if wait_for_slot and free[slot] is not None:
            free[slot].synchronize()
        ring[slot].copy_(blob)
        with GPU.stream(side):
            there = torch.empty(4, 2, 2, 8, 4, device=fakegpu.NAME)
            there.copy_(ring[slot], non_blocking=True)
            free[slot] = side.record_event()
            arrived.append((free[slot], there))
    for number, (event, there) in enumerate(arrived):
        if wait_for_copy:
            GPU.current_stream().wait_event(event)
        arena[..., number * 8 : number * 8 + 8, :].copy_(there)
    return arena.cpu()


def test_a_ring_of_buffers() -> None:
    assert torch.equal(through_a_ring(), torch.cat(BLOBS, 3))


def test_what_is_used_before_it_has_come_is_no_number() -> None:
    assert through_a_ring(wait_for_copy=False).isnan().any()


def test_a_buffer_that_is_filled_again_too_early() -> None:
    assert not torch.equal(through_a_ring(wait_for_slot=False), torch.cat(BLOBS, 3))


def test_what_is_brought_back_is_there_once_it_was_waited_for() -> None:
    host, ones = torch.zeros(100).pin_memory(), torch.ones(100, device=fakegpu.NAME)
    host.copy_(ones, non_blocking=True)
    event = GPU.current_stream().record_event()
    assert (host.sum(), event.query()) == (0, False)
    event.synchronize()
    assert (host.sum(), event.query()) == (100, True)


def test_work_takes_time_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakegpu.device, "seconds_per_number", 1e-4)
    start, end = GPU.Event(enable_timing=True), GPU.Event(enable_timing=True)
    x = torch.zeros(1000, device=fakegpu.NAME)
    start.record()
    y = x + 1  # 100 ms
    end.record()
    assert not end.query()
    assert y.sum().item() == 1000
    assert end.query()
    assert start.elapsed_time(end) >= 99


def test_the_host_s_tensors_are_not_taken() -> None:
    there = torch.ones(3, 3, device=fakegpu.NAME)
    with pytest.raises(RuntimeError, match="same device"):
        there @ torch.ones(3, 3)
    with pytest.raises(TypeError, match="can't convert fakegpu"):
        there.numpy()
    assert (there * torch.tensor(2.0)).sum().item() == 18


def test_counting() -> None:
    there = torch.arange(10.0).to(fakegpu.NAME)
    with fakegpu.counting() as trace:
        there.add_(1).cpu()
        torch.ones(2).to(fakegpu.NAME)
        bool(there.any())
    assert trace.counts["h2d"] == 1
    assert trace.counts["d2h"] == 1
    assert trace.counts["wait"] == 3
    assert trace.nbytes["d2h"] == 40
    assert "test_fakegpu.py" in trace.table()
