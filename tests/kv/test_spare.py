from __future__ import annotations

import threading

import numpy as np
import torch

from chunkcache.kv.spare import BufferPool


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_when_its_last_user_is_gone() -> None:
    memory = BufferPool()
    array = memory.take(1000)
    home = address(array)
    tensor = torch.from_numpy(array)[10:20]
    view = array.data[5:]
    del array
    assert address(memory.take(1000)) != home, "a tensor and a view still see it"
    del tensor
    assert address(memory.take(1000)) != home, "a view still sees it"
    del view
    assert address(memory.take(900)) == home


def test_only_memory_of_about_that_size_is_used_again() -> None:
    memory = BufferPool()
    for first, then, again in ((1000, 1001, False), (1000, 499, False), (1000, 500, True)):
        home = address(memory.take(first))
        array = memory.take(then)
        assert array.nbytes == then
        assert (address(array) == home) == again
        del array


def test_so_many_pieces_are_kept_and_no_large_ones() -> None:
    memory = BufferPool(pieces=2, most_bytes=2000)
    arrays = [memory.take(1000) for _ in range(3)]
    homes = [address(array) for array in arrays]
    arrays.clear()
    assert len(memory._spare) == 2
    again = [memory.take(1000) for _ in range(2)]
    assert {address(array) for array in again} <= set(homes)
    del again
    memory.take(2001)
    assert {len(piece) for piece in memory._spare} == {1000}
    BufferPool(pieces=0).take(1000)


def test_no_two_users_have_the_same_memory() -> None:
    memory = BufferPool(pieces=4)
    clashes: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            array = memory.take(64)
            array[:] = number
            clashes.extend(array[array != number].tolist())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
