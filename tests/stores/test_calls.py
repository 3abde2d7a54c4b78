from __future__ import annotations

import threading

import pytest

from chunkcache.errors import StoreError
from chunkcache.stores.calls import calls_of_prompt, current_calls, note_partial


def test_what_is_noted_inside_is_gathered() -> None:
    note_partial(StoreError("before"))
    with calls_of_prompt() as calls:
        note_partial(StoreError("one"))
        with calls_of_prompt() as inner:
            note_partial(StoreError("inner"))
        current_calls().seconds["store"] += 1.5
    note_partial(StoreError("after"))
    assert [str(error) for error in calls.errors] == ["one"]
    assert [str(error) for error in inner.errors] == ["inner"]
    assert calls.seconds == {"store": 1.5}


def test_it_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), calls_of_prompt() as calls:
        raise KeyError
    note_partial(StoreError("after"))
    assert calls.errors == []


def test_threads_do_not_mix() -> None:
    gathered: dict[str, list[str]] = {}
    barrier = threading.Barrier(2)

    def prompt(name: str) -> None:
        with calls_of_prompt() as calls:
            barrier.wait(10)
            note_partial(StoreError(name))
            barrier.wait(10)
        gathered[name] = [str(error) for error in calls.errors]

    threads = [threading.Thread(target=prompt, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gathered == {"a": ["a"], "b": ["b"]}
