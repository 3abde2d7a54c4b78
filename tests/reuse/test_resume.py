"""One cache object, several prompts, where tokens do not say all of what it holds.

Images, embeddings and K/V by hand: the last prompt's answer is that of a `DynamicCache`, or of a
run without any cache, or an error says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from chunkcache import RedisChunkCache
from chunkcache.errors import UnsupportedCallError
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.prompts import same_answer
from tests.vision import IMAGE, a_vision_model, image_inputs, text, with_image

SEVERAL_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # of positions
KINDS = (*SEVERAL_AXES, "llava", "gemma3")
HOW = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [5, 6, 7, 8]}
FULL = {**HOW, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module", params=KINDS)
def seeing(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, a_vision_model(request.param)


def answer(model: Any, ids: Tensor, cache: Any = None, **inputs: Any) -> Any:
    return model.generate(
        input_ids=ids,
        past_key_values=cache,
        **{"attention_mask": torch.ones_like(ids), **inputs},
        **FULL,
    )


def attempt(ask: Callable[[], Any]) -> Any:
    """What it returns, or `None` if an error says to reset the cache."""
    try:
        return ask()
    except UnsupportedCallError as error:
        refused = str(error)
    assert "call cache.reset() before a new prompt" in refused
    return None


def images_of(kind: str, ids: Tensor, seed: int = 1) -> dict[str, Any]:
    """All images that the ids name."""
    count = int((ids == IMAGE).sum()) // 4
    return image_inputs(kind, ids, seed, count) if count else {}


Turn = tuple[Tensor, bool, bool]
"""New ids, whether they continue what was said, and whether all images are given (again)."""
PICTURE, OTHER = with_image(text(60, 1)), with_image(text(50, 2), at=20)
REUSED, ANEW, PERHAPS = "reused", "computed anew", "refused where positions have several axes"
SCENES: dict[str, tuple[str, list[Turn]]] = {
    # With what must become of the last turn. Its answer is that of a run without a cache which is
    # given all images.
    "image, then text": (REUSED, [(PICTURE, False, True), (text(20, 3), True, False)]),
    "three turns": (
        REUSED, [(PICTURE, False, True), (text(9, 3), True, False), (text(20, 4), True, False)],
    ),
    "text, then text": (REUSED, [(text(60, 1), False, False), (text(20, 3), True, False)]),
    "image, given again": (PERHAPS, [(PICTURE, False, True), (text(20, 3), True, True)]),
    "two images": (ANEW, [(PICTURE, False, True), (OTHER, True, True)]),
    "image, text, two images": (
        ANEW, [(PICTURE, False, True), (text(9, 3), True, False), (OTHER, True, True)],
    ),
    "text, then image": (ANEW, [(text(60, 4), False, False), (OTHER, True, True)]),
    "image, then other text": (PERHAPS, [(PICTURE, False, True), (text(80, 5), False, False)]),
    "text, then another image": (PERHAPS, [(text(60, 4), False, False), (PICTURE, False, True)]),
    "image, then another prompt": (PERHAPS, [(PICTURE, False, True), (OTHER, False, True)]),
    "image, then shorter text": (PERHAPS, [(PICTURE, False, True), (text(20, 5), False, False)]),
    "image, then the same": (PERHAPS, [(PICTURE, False, True), (PICTURE, False, True)]),
}  # fmt: skip


@pytest.mark.parametrize("scene", SCENES)
def test_images_among_what_is_held(seeing: tuple[str, Any], scene: str) -> None:
    kind, model = seeing
    fate, turns = SCENES[scene]
    store = MemoryStore()
    cache = RedisChunkCache(model, store, chunk_size=8)
    said = text(0)
    for number, (new, goes_on, given) in enumerate(turns):
        ids = torch.cat([said, new], dim=1) if goes_on else new
        want = answer(model, ids, **images_of(kind, ids))
        images = images_of(kind, ids) if given else {}
        got = attempt(lambda i=ids, m=images: answer(model, i, cache, **m))
        if got is None:
            assert number, "a new object takes every prompt"
            assert fate == PERHAPS, scene
            assert kind in SEVERAL_AXES, scene
            cache.reset()
            got = answer(model, ids, cache, **images_of(kind, ids))
        assert same_answer(got, want), scene
        if fate == REUSED and number:
            assert cache.report.reused >= said.shape[1] - 1
        said = want.sequences
    # Of what an image has shaped nothing is in the store.
    fresh = RedisChunkCache(model, store, chunk_size=8)
    plain = text(60, 1)
    assert same_answer(answer(model, plain, fresh), answer(model, plain))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_ids_with_another_image(seeing: tuple[str, Any], seed: int) -> None:
    kind, model = seeing
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=8)
    answer(model, PICTURE, cache, **images_of(kind, PICTURE))
    images = images_of(kind, PICTURE, seed + 1)
    want = answer(model, PICTURE, **images)
    got = attempt(lambda: answer(model, PICTURE, cache, **images))
    assert kind in SEVERAL_AXES if got is None else same_answer(got, want)


def test_an_image_that_is_named_and_not_given(seeing: tuple[str, Any]) -> None:
    """The text behind the first prompt is not what was answered, so what is held ends too late."""
    kind, model = seeing
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=8)
    answer(model, PICTURE, cache, **images_of(kind, PICTURE))
    with pytest.raises(UnsupportedCallError, match=r"reset\(\)"):
        answer(model, torch.cat([PICTURE, text(20, 3)], dim=1), cache)


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_that_take_turns(kind: str) -> None:
    """Models of several axes remember how far the last image's positions were from the ids'."""
    model = a_vision_model(kind)
    with_picture, without = (RedisChunkCache(model, MemoryStore(), chunk_size=8) for _ in range(2))
    said = answer(model, PICTURE, with_picture, **images_of(kind, PICTURE)).sequences
    answer(model, text(40, 9), without)
    ids = torch.cat([said, text(20, 3)], dim=1)
    got = attempt(lambda: answer(model, ids, with_picture))
    assert (got is None) == (kind in SEVERAL_AXES)
    assert got is None or same_answer(got, answer(model, ids, **images_of(kind, ids)))


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava"])
def test_new_ids_alone_behind_an_image(kind: str) -> None:
    model = a_vision_model(kind)
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=8)
    first = answer(model, PICTURE, cache, **images_of(kind, PICTURE)).sequences
    # The last token of an answer was not fed.
    new = torch.cat([first[:, -1:], text(20, 3)], dim=1)
    whole = torch.cat([first, text(20, 3)], dim=1)
    want = answer(model, whole, **images_of(kind, whole))
    got = answer(model, new, cache, attention_mask=torch.ones_like(whole))
    got.sequences = torch.cat([whole[:, : -new.shape[1]], got.sequences], dim=1)
    assert same_answer(got, want)


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava"])
@pytest.mark.parametrize(
    "how",
    [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3, "num_return_sequences": 3}],
)
def test_several_answers_about_an_image(kind: str, how: dict[str, Any]) -> None:
    model = a_vision_model(kind)
    inputs = {**images_of(kind, PICTURE), "attention_mask": torch.ones_like(PICTURE), **HOW, **how}

    def ask(cache: Any) -> list[Any]:
        torch.manual_seed(0)
        first = model.generate(input_ids=PICTURE, past_key_values=cache, **inputs)
        rows = torch.cat([first, text(9, 3).expand(len(first), -1)], dim=1)
        second = model.generate(
            input_ids=rows, past_key_values=cache, attention_mask=torch.ones_like(rows), **HOW
        )
        return [first.tolist(), second.tolist()]

    want = ask(DynamicCache(config=model.config))
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=8)
    # The rows of beams are held as the search left them, not as they were returned: a plain cache
    # mixes them up.
    assert attempt(lambda: ask(cache)) == (None if "num_beams" in how else want)


@pytest.mark.parametrize("held", ["image", "edited"])
def test_a_prompt_in_pieces(held: str) -> None:
    """Pieces of a prompt are not taken for shorter prompts."""
    model = a_vision_model("llava")
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=8)
    first = PICTURE if held == "image" else text(60)
    said = answer(model, first, cache, **images_of("llava", first)).sequences
    if held == "edited":
        for layer in cache.layers:
            layer.values[..., :30, :].mul_(1.5)
    ids = torch.cat([said, text(20, 3)], dim=1)
    for size in (7, 40):
        assert attempt(lambda s=size: answer(model, ids, cache, prefill_chunk_size=s)) is None
    assert attempt(lambda: answer(model, first[:, :8], cache)) is None
    whole = answer(model, ids, cache, prefill_chunk_size=ids.shape[1])
    if held == "image":
        assert same_answer(whole, answer(model, ids, **images_of("llava", ids)))
    assert cache.report.reused == said.shape[1] - 1


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_with_an_image_each(kind: str) -> None:
    model = a_vision_model(kind)
    rows = torch.cat([PICTURE, PICTURE], dim=0)
    rows[1, :7] = 0
    rows[1, 30:] = text(30, 9)
    mask = torch.ones_like(rows)
    mask[1, :7] = 0
    images = images_of(kind, rows)
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=8)
    want = answer(model, rows, attention_mask=mask, **images)
    got = answer(model, rows, cache, attention_mask=mask, **images)
    assert same_answer(got, want)
    longer = torch.cat([want.sequences, text(9, 5).expand(2, -1)], dim=1)
    mask = torch.cat([mask, torch.ones_like(longer[:, rows.shape[1] :])], dim=1)
    want = answer(model, longer, attention_mask=mask, **images_of(kind, longer))
    assert same_answer(answer(model, longer, cache, attention_mask=mask), want)
    assert cache.report.reused > 2 * 50


# ------------------------------------------------------------------ embeddings, K/V by hand


def embeddings(model: Any, ids: Tensor) -> Tensor:
    """Those of no token."""
    embeds = model.get_input_embeddings()(ids).detach()
    return embeds + embeds.roll(1, dims=-1) / 2


def embedded(model: Any, cache: Any, ids: Tensor) -> None:
    """A prompt of embeddings, and a short answer."""
    embeds = embeddings(model, ids)
    model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=1, do_sample=False)


@torch.no_grad()
def embedded_directly(model: Any, cache: Any, ids: Tensor) -> None:
    model(inputs_embeds=embeddings(model, ids), past_key_values=cache, use_cache=True)


@torch.no_grad()
def by_hand(model: Any, cache: Any, ids: Tensor) -> None:
    plain = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
    for number, layer in enumerate(plain.past_key_values.layers):
        cache.update(layer.keys, layer.values, number)


@torch.no_grad()
def half_by_hand(model: Any, cache: Any, ids: Tensor) -> None:
    """The model's own first, then others behind."""
    model(ids[:, :30], past_key_values=cache, use_cache=True)
    plain = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
    for number, layer in enumerate(plain.past_key_values.layers):
        cache.update(layer.keys[..., 30:, :], layer.values[..., 30:, :], number)


def half_embedded(model: Any, cache: Any, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache, use_cache=True)
    embedded_directly(model, cache, ids[:, 30:])


@torch.no_grad()
def scaled(model: Any, cache: Any, ids: Tensor) -> None:
    """K/V by hand that no token has."""
    plain = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
    for number, layer in enumerate(plain.past_key_values.layers):
        cache.update(layer.keys, layer.values * 1.5, number)


def cropped(fill: Callable[[Any, Any, Tensor], None]) -> Callable[[Any, Any, Tensor], None]:
    def change(model: Any, cache: Any, ids: Tensor) -> None:
        fill(model, cache, torch.cat([ids, tokens(10, rows=len(ids), seed=9)], dim=1))
        cache.crop(-10)

    change.__name__ = f"{fill.__name__}, cropped"
    return change


def forward(model: Any, cache: Any, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)


FILLS = [
    embedded, embedded_directly, half_embedded, by_hand, half_by_hand, scaled,
    *map(cropped, (forward, embedded_directly, by_hand, half_embedded)),
]  # fmt: skip


CASES = [(kind, fill) for kind in ("llama", "gpt2") for fill in FILLS]
# A plain sliding window keeps a few columns only, to crop or to copy.
CASES += [("gemma3_text", fill) for fill in (embedded, embedded_directly, half_embedded)]


@pytest.mark.parametrize(
    ("kind", "fill"), CASES, ids=[f"{kind}, {fill.__name__}" for kind, fill in CASES]
)
def test_held_without_ids(kind: str, fill: Callable[..., None]) -> None:
    """Whole ids or the new ones alone: as with a `DynamicCache`, or an error."""
    model = tiny(kind)
    rows = 2 if kind == "gpt2" else 1
    ids, new = tokens(70, rows=rows, seed=1), tokens(12, rows=rows, seed=2)
    whole = torch.cat([ids, new], dim=1)
    store = MemoryStore()

    def ask(cache: Any, given: Tensor) -> Any:
        fill(model, cache, ids)
        if cache.get_seq_length() != ids.shape[1]:
            cache.crop(ids.shape[1] - cache.get_seq_length())
        return answer(model, given, cache, attention_mask=torch.ones_like(whole))

    for given in (new, whole):
        want = ask(DynamicCache(config=model.config), given)
        cache = RedisChunkCache(model, store, chunk_size=16)
        got = attempt(lambda c=cache, g=given: ask(c, g))
        if got is None:
            assert given is whole
            cache.reset()
            got, want = answer(model, whole, cache), answer(model, whole)
        assert same_answer(got, want)
        assert cache.flush(5)
    # Nothing of it is in the store under these ids.
    fresh = RedisChunkCache(model, store, chunk_size=16)
    assert same_answer(answer(model, whole, fresh), answer(model, whole))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("odd", ["positions", "mask"])
def test_new_ids_alone_behind_what_is_no_text(kind: str, odd: str) -> None:
    """What is held is what a plain cache holds, wherever its positions have got to."""
    model = tiny(kind)
    ids, new = tokens(40, rows=2, seed=1), tokens(12, rows=2, seed=2)
    whole = torch.cat([ids, new], dim=1)
    how: dict[str, Tensor] = {"position_ids": torch.arange(5, 45).expand(2, -1)}
    if odd == "mask":
        seen = torch.ones(40, 40, dtype=torch.bool).tril()
        seen[20:, 5:9] = False
        how = {"attention_mask": seen.expand(2, 1, -1, -1)}

    def ask(cache: Any, **inputs: Any) -> Any:
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True, **how)
        return answer(model, new, cache, attention_mask=torch.ones_like(whole), **inputs)

    want = ask(DynamicCache(config=model.config))
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=16)
    assert same_answer(ask(cache), want)
    # Positions of the caller's that are neither those of a new prompt nor of what comes next.
    cache.reset()
    positions = torch.arange(90, 102).expand(2, -1)
    assert attempt(lambda: ask(cache, position_ids=positions)) is None


def test_embeddings_then_other_embeddings() -> None:
    """As embeddings always come whole, a `DynamicCache` cuts those off that it holds."""
    model = tiny()
    embed = model.get_input_embeddings()
    first, second = tokens(70, seed=1), tokens(90, seed=2)
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=16)

    def ask(ids: Tensor, cache: Any = None) -> Any:
        embeds = embed(ids).detach()
        return model.generate(inputs_embeds=embeds, past_key_values=cache, **FULL)

    for ids in (first, second, torch.cat([second, first], dim=1)):
        assert same_answer(ask(ids, cache), ask(ids))


@pytest.mark.parametrize("change", ["positions", "mask", "steps"])
def test_ids_alone_do_not_make_a_forward_text(change: str) -> None:
    """Tokens that were computed at other positions, or did not see all, are not continued."""
    model = tiny()
    ids, store = tokens(140, seed=1), MemoryStore()
    cache = RedisChunkCache(model, store, chunk_size=64)
    with torch.no_grad():
        for begin, end in [(0, 100), *((n, n + 1) for n in range(100, 105))]:
            mask = torch.ones((1, end), dtype=torch.long)
            positions = torch.arange(begin, end)[None]
            if begin and change == "mask":
                mask[:, 50:90] = 0
            if begin == 100 or (begin and change == "positions"):
                positions = positions + (0 if change == "mask" else 300)
            model(
                ids[:, begin:end], attention_mask=mask, position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
    assert same_answer(answer(model, ids, cache), answer(model, ids))
    assert cache.report.skipped == ""  # and the store is not blamed
    assert cache.report.reused == 100
