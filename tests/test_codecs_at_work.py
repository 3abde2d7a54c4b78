"""Codecs, secrets and seals through generate(): what is exact is said to be, and nothing leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from servers import Server

from chunkcache import RedisChunkCache, SettingError, Settings, open_store
from chunkcache.errors import SealedBlobError
from chunkcache.keys import CODECS
from chunkcache.stores.base import ChunkStore, Entry, ReadOnly, read_blobs
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.prompts import (
    DOCUMENTS,
    anywhere,
    build,
    close,
    joined,
    logits,
    meet,
    padded,
    prefill,
    shuffled_prompt,
)

KEY, OTHER_KEY = "1f" * 32, "e2" * 32
SECRET, OTHER_SECRET = "a secret of ours", "a secret of theirs"
IDS = random_ids(300)
LOSSY = [name for name in CODECS if "bf16" in name or "int8" in name]
lossy_codecs = pytest.mark.parametrize("codec", LOSSY)
sealed_or_not = pytest.mark.parametrize("seal", ["", KEY], ids=["open", "sealed"])
every_codec = pytest.mark.parametrize("codec", CODECS)


@pytest.fixture(scope="module")
def model():
    return build(num_hidden_layers=2)


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture(params=["memory", "redis"])
def any_store(request: pytest.FixtureRequest) -> Iterator[ChunkStore]:
    """RAM, and a real server."""
    url = "memory://"
    if request.param == "redis":
        server: Server = request.getfixturevalue("redis_server")
        url = server.unix_url
    patient = {"connect_timeout": 10, "read_timeout": 10, "max_delay": 60}  # on a busy machine
    with open_store(url, **patient) as store:
        yield store


def generate(model, ids, cache=None):
    """The whole sequence, written behind included."""
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    if cache is not None:
        cache.flush()
    return out


def entries(store, begin=""):
    """All entries of a store: metadata and blob by key."""
    keys = sorted(each.key for page in store.scan(begin) for each in page)
    fields = store.read_metadata(keys)
    blobs = [blob and bytes(blob) for blob in read_blobs(store, keys)]
    return dict(zip(keys, zip(fields, blobs, strict=True), strict=True))


def chunks_of(store):
    return {key: entry for key, entry in entries(store).items() if key.startswith("safetensors")}


def replace_blob(store, key, blob):
    fields = store.read_metadata([key])[0]
    store.delete([key])
    store.write([Entry(key, fields or {}, memoryview(blob))])
    store.flush()


# ------------------------------------------------------------------------ exact or not


@every_codec
@sealed_or_not
def test_what_is_stored_is_found_and_exactness_is_told(model, any_store, codec, seal):
    plain = generate(model, IDS)
    cold = RedisChunkCache(model, any_store, codec=codec, seal=seal)
    assert torch.equal(generate(model, IDS, cold), plain)
    assert cold.report.exact
    for fields, blob in chunks_of(any_store).values():
        assert fields["bytes"] == str(len(blob))
        assert fields["codec"].startswith(codec)
    warm = RedisChunkCache(model, any_store, codec=codec, seal=seal)
    found, expected = logits(model, IDS, warm), logits(model, IDS)
    report = warm.report
    assert report.reused == 299
    assert report.errors == []
    assert report.exact == (codec not in LOSSY)
    assert report.to_dict()["lossy"] == ("" if report.exact else codec)
    assert (codec in str(report)) == (codec in LOSSY)
    assert close(found, expected, 0.05 if codec in LOSSY else 1e-5)
    assert report.bytes_read == sum(len(blob) for _, blob in chunks_of(any_store).values())
    ratio = (report.bytes_read + report.bytes_saved) / report.bytes_read
    assert ratio > {"bf16": 1.5, "int8": 2.2}.get(codec.removesuffix("+zstd")[-4:], 0.99)


@pytest.mark.parametrize("codec", ["safetensors-bf16", "safetensors-bf16+zstd"])
def test_bf16_is_exact_for_a_model_in_bf16(store, codec):
    model = tiny("llama", dtype=torch.bfloat16)
    generate(model, IDS, RedisChunkCache(model, store, codec=codec))
    warm, plain = RedisChunkCache(model, store, codec=codec), RedisChunkCache(model, MemoryStore())
    logits(model, IDS, warm)
    logits(model, IDS, plain)
    assert warm.report.reused == 299
    assert warm.report.exact
    for mine, its in zip(warm.layers, plain.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :128], its.keys[:, :, :128])


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "gemma3_text", "deepseek_v3", "gpt_neox"])
def test_int8_fits_every_kind_of_keys(store, kind):
    """Where they turn, and where no rule is known."""
    model = tiny(kind)
    generate(model, IDS, RedisChunkCache(model, store, codec="safetensors-int8"))
    warm = RedisChunkCache(model, store, codec="safetensors-int8")
    assert close(logits(model, IDS, warm), logits(model, IDS), 0.05)
    assert warm.report.reused == 299
    (fields, blob) = next(iter(chunks_of(store).values()))
    turned = kind not in ("gpt2", "bloom")
    assert (b'"keys":"position 0"' in blob) == turned
    assert fields["codec"] == "safetensors-int8"


@lossy_codecs
def test_rounding_is_told_as_long_as_it_is_held(model, store, codec):
    generate(model, IDS, RedisChunkCache(model, store, codec=codec))
    cache = RedisChunkCache(model, store, codec=codec)
    begin = random_ids(50, seed=9)
    generate(model, begin, cache)
    assert cache.report.exact
    out = generate(model, IDS, cache)
    assert not cache.report.exact
    out = generate(model, joined(out, 20), cache)
    assert cache.report.reused > 300
    assert cache.report.lossy == codec  # it was computed behind rounded K/V
    generate(model, joined(random_ids(30, seed=8)), cache)
    assert cache.report.exact


def test_what_is_dropped_no_longer_counts(model, store):
    """A conversation whose beginning was computed, and whose next turn came from the store."""
    settings = {"codec": "safetensors-int8", "store_tail": False}
    begin, more = IDS[:, :200], joined(IDS, 200)
    cache = RedisChunkCache(model, store, **settings)
    generate(model, begin, cache)
    generate(model, more, RedisChunkCache(model, store, **settings))
    generate(model, more, cache)
    assert cache.report.reused > 300
    assert cache.report.lossy
    assert cache._conversation.transcript.lossy_from == 200
    other = joined(begin, 30)
    assert torch.equal(generate(model, other, cache), generate(model, other))
    assert cache.report.reused == 200
    assert cache.report.exact


def test_what_was_rounded_first_counts(model, store):
    """A beginning from the store, and more from the store behind it in the next turn."""
    settings = {"codec": "safetensors-int8"}
    begin, more = IDS[:, :256], joined(IDS, 200)
    generate(model, more, RedisChunkCache(model, store, **settings))
    cache = RedisChunkCache(model, store, **settings)
    generate(model, begin, cache)
    generate(model, more, cache)
    generate(model, joined(begin, 30), cache)
    assert cache.report.reused == 256
    assert cache.report.lossy


def test_what_was_computed_before_moved_text_is_exact(model, store):
    settings = {"codec": "safetensors-int8"}
    logits(model, joined(10, *DOCUMENTS, 20), anywhere(model, store, **settings))
    cache = anywhere(model, store, repair="head:4", **settings)
    begin = random_ids(150, seed=6)
    generate(model, joined(begin, DOCUMENTS[0], 9), cache)
    assert cache.report.moved > 200
    assert cache.report.lossy
    assert cache._conversation.transcript.lossy_from == 154
    generate(model, joined(begin, 170), cache)
    assert cache.report.reused == 150
    assert cache.report.exact


def test_rows_that_read_nothing_are_exact(model, store):
    """A row that must be computed from its start has all rows computed."""
    generate(model, IDS, RedisChunkCache(model, store, codec="safetensors-int8"))
    cache = RedisChunkCache(model, store, codec="safetensors-int8")
    prompt = padded(IDS, random_ids(300, seed=4))
    assert close(logits(model, prompt, cache), logits(model, prompt))
    assert cache.report.exact


# ------------------------------------------------------------------------ worlds apart


@lossy_codecs
def test_what_was_computed_behind_rounded_text_is_never_found_as_exact(model, store, codec):
    more = joined(IDS, 300)
    generate(model, IDS, RedisChunkCache(model, store, codec=codec))
    behind = RedisChunkCache(model, store, codec=codec)
    generate(model, more, behind)
    assert behind.report.reused == 300
    assert behind.report.bytes_written > 0
    plain = RedisChunkCache(model, store)
    assert torch.equal(generate(model, more, plain), generate(model, more))
    assert plain.report.reused == 0
    assert plain.report.exact
    again = RedisChunkCache(model, store, codec=codec)
    generate(model, more, again)
    assert again.report.reused == 599
    assert not again.report.exact


def test_every_codec_has_a_world_of_its_own(model, store):
    """No keys in common, and none spoils the index of another one."""
    kinds = [{"codec": codec, "seal": seal} for codec in CODECS for seal in ("", KEY)]
    seen: dict[str, set[str]] = {}
    prompt = joined(10, DOCUMENTS[0], 20)
    for kind in kinds:
        before = set(entries(store))
        logits(model, prompt, anywhere(model, store, **kind))
        new = set(entries(store)) - before
        hashes = {key.rpartition("@")[2] for key in new if "self-test" not in key}
        format = kind["codec"] + ("+sealed" if kind["seal"] else "")  # keys name the codec
        assert {key.partition("@")[0] for key in new} <= {format, "anchor", "self-test", "moving"}
        assert not any(hashes & others for others in seen.values())
        seen[str(kind)] = hashes
    for kind in kinds:
        cache = anywhere(model, ReadOnly(store), **kind)
        logits(model, joined(33, DOCUMENTS[0], 7), cache)
        assert cache.report.moved > 200, kind


@pytest.mark.parametrize("codec", ["safetensors", "safetensors-int8+zstd"])
def test_a_damaged_blob_is_a_miss_and_is_mended(model, any_store, codec):
    settings = {"codec": codec, "seal": KEY}
    plain = generate(model, IDS)
    generate(model, IDS, RedisChunkCache(model, any_store, **settings))
    key, (_, blob) = next(iter(chunks_of(any_store).items()))
    for harm in ("bit", "long", "short"):
        bad = bytearray(blob)
        bad[len(bad) // 2] ^= 1
        bad = {"bit": bad, "long": bytes(9 * len(blob)), "short": blob[:40]}[harm]
        replace_blob(any_store, key, bytes(bad))
        cache = RedisChunkCache(model, any_store, **settings)
        out = generate(model, IDS, cache)
        assert out.shape == plain.shape
        assert cache.report.reused < 299
        assert any("damaged" in error for error in cache.report.errors)
        assert cache.report.causes == {"damaged": 1}
        whole = RedisChunkCache(model, any_store, **settings)
        generate(model, IDS, whole)
        assert whole.report.reused == 299
        assert whole.report.errors == []


# ------------------------------------------------------------------------ secrets


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_without_the_secret_nothing_is_found(model, any_store, mode):
    kinds = [{"secret": SECRET}, {"secret": OTHER_SECRET}, {"secret": ""}]
    hashes = []
    for kind in kinds:
        before = set(entries(any_store))
        cache = RedisChunkCache(model, any_store, reuse=mode, **kind)
        generate(model, IDS, cache)
        assert cache.report.reused == cache.report.moved == 0
        new = set(entries(any_store)) - before
        hashes.append(
            {key.rpartition("@")[2] for key in new if not key.startswith(("self-test", "moving"))}
        )
        # What is noted of a chunk does not name it otherwise, either.
        parents = {(fields or {}).get("parent") for fields, _ in chunks_of(any_store).values()}
        assert parents - {""} <= set().union(*hashes)
    assert all(hashes)
    assert not any(hashes[i] & hashes[j] for i in range(3) for j in range(i))
    for kind in kinds:
        cache = RedisChunkCache(model, any_store, reuse=mode, **kind)
        generate(model, IDS, cache)
        assert cache.report.reused == 299
        assert cache.report.exact


def test_a_secret_is_part_of_every_hash_of_approximate_chunks(model, store):
    meet(model, store)
    found = []
    for secret in (SECRET, OTHER_SECRET):
        mine = MemoryStore()
        logits(model, joined(10, *DOCUMENTS, 20), anywhere(model, mine, secret=secret))
        prompt = joined(40, DOCUMENTS[1], 200)
        cache = anywhere(model, mine, secret=secret, repair="none")
        logits(model, prompt, cache)
        assert cache.report.moved > 200
        found.append(
            {k for k, (f, _) in entries(mine).items() if f.get("context") == "approximate"}
        )
    assert all(found)
    assert not found[0] & found[1]


def test_secrets_and_keys_are_not_shown(model, store, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_SECRET", SECRET)
    monkeypatch.setenv("CHUNKCACHE_SEAL", f"{KEY},{OTHER_KEY}")
    cache = RedisChunkCache(model, store)
    generate(model, IDS, cache)
    assert cache.settings.secret == SECRET
    salt = cache._conversation.keys.salt
    shown = [
        repr(cache.settings), repr(cache._context), repr(cache._conversation.keys), repr(cache),
        json.dumps(cache.report.to_dict()), str(cache.report), str(entries(store)),
    ]  # fmt: skip
    for text in shown:
        for hidden in (SECRET, KEY, OTHER_KEY, repr(bytes.fromhex(KEY)), repr(salt)):
            assert hidden not in text
    for given in ({"secret": 7.5}, {"seal": KEY[:-2]}, {"seal": f"{KEY};"}, {"secret": SECRET[:9]}):
        with pytest.raises(SettingError, match=r"secret|seal") as error:
            Settings(**given)
        assert KEY[:20] not in str(error.value)
        assert SECRET[:9] not in str(error.value)


# ------------------------------------------------------------------------ seals


def test_a_sealed_store_shows_no_tokens(model, any_store):
    cache = anywhere(model, any_store, seal=KEY)
    logits(model, joined(10, DOCUMENTS[0], 20), cache)
    cache.flush()
    ids = joined(10, DOCUMENTS[0], 20)[0].tolist()
    chunks = chunks_of(any_store)
    assert len(chunks) == 3
    for fields, blob in chunks.values():
        start, stop = map(int, fields["positions"].split("-"))
        text = json.dumps(ids[start:stop], separators=(",", ":"))
        assert text[:20] not in str(fields)
        assert text[:20].encode() not in blob
        assert b"layers" not in blob
        assert fields["codec"] == "safetensors+sealed"


def test_swapped_blobs_are_misses(model, any_store):
    """Even of chunks of equal size, and with their own metadata beside them."""
    generate(model, IDS, RedisChunkCache(model, any_store, seal=KEY, store_tail=False))
    chunks = chunks_of(any_store)
    (one, (_, first)), (two, (_, second)) = chunks.items()
    assert len(first) == len(second)
    replace_blob(any_store, one, second)
    replace_blob(any_store, two, first)
    cache = RedisChunkCache(model, any_store, seal=KEY)
    assert torch.equal(generate(model, IDS, cache), generate(model, IDS))
    assert cache.report.reused == 0
    assert "seal is broken" in cache.report.errors[0]


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_a_blob_with_another_key_is_a_miss_and_is_left_alone(model, any_store, mode):
    settings = {"reuse": mode, "store_tail": False}
    generate(model, IDS, RedisChunkCache(model, any_store, seal=KEY, **settings))
    before = entries(any_store)
    stranger = RedisChunkCache(model, any_store, seal=OTHER_KEY, **settings)
    assert torch.equal(generate(model, IDS, stranger), generate(model, IDS))
    assert stranger.report.reused == 0
    assert "sealed with a key" in stranger.report.errors[0]
    assert stranger.report.causes == {SealedBlobError.cause: 1}
    assert "sealed with a key" in stranger.report.chunks[0]["reason"]
    assert entries(any_store) == before
    friend = RedisChunkCache(model, any_store, seal=KEY, **settings)
    generate(model, IDS, friend)
    assert friend.report.reused == 256


def test_keys_can_be_replaced_without_losing_what_is_stored(model, any_store):
    more = joined(IDS[:, :256], 200)
    generate(model, IDS, RedisChunkCache(model, any_store, seal=KEY))
    both = RedisChunkCache(model, any_store, seal=f"{OTHER_KEY},{KEY}")
    generate(model, more, both)
    assert both.report.reused == 256
    new = RedisChunkCache(model, any_store, seal=OTHER_KEY)
    generate(model, more, new)
    assert new.report.reused == 0  # the beginning is sealed with the old one still
    old = RedisChunkCache(model, any_store, seal=KEY)
    generate(model, more, old)
    assert old.report.reused == 256


def test_text_sealed_with_another_key_is_not_moved_and_stays_in_the_index(model, store):
    prompt, later = joined(10, *DOCUMENTS, 20), joined(40, DOCUMENTS[2], 30)
    logits(model, prompt, anywhere(model, store, seal=KEY))
    before = entries(store)
    stranger = anywhere(model, store, seal=OTHER_KEY)
    assert close(logits(model, later, stranger), logits(model, later))
    assert stranger.report.moved == 0
    after = entries(store)
    for key in before:  # what the stranger has added stands beside it
        assert before[key][0].items() <= after[key][0].items()
        assert before[key][1] == after[key][1]
    friend = anywhere(model, ReadOnly(store), seal=KEY)
    logits(model, joined(21, DOCUMENTS[2], 30), friend)
    assert friend.report.moved > 200


# ------------------------------------------------------------------------ reuse at any position


@every_codec
@sealed_or_not
def test_text_is_moved_in_every_codec(any_store, codec, seal):
    """With one layer a move is exact, so what is left is the codec's rounding."""
    model = build(num_hidden_layers=1)
    settings = {"codec": codec, "seal": seal}
    logits(model, joined(10, *DOCUMENTS, 20), first := anywhere(model, any_store, **settings))
    first.flush()
    found, report = prefill(
        model, ReadOnly(any_store), shuffled_prompt(), repair="none", **settings
    )
    assert report.moved > 900
    assert report.errors == []
    assert report.lossy == (codec if codec in LOSSY else "")
    assert (report.bytes_saved > report.bytes_read / 2) == (codec in LOSSY)
    assert close(found, logits(model, shuffled_prompt()), 0.02 if codec in LOSSY else 1e-4)


def test_moved_text_that_is_all_computed_again_is_exact(model, store):
    settings = {"codec": "safetensors-int8"}
    logits(model, joined(10, *DOCUMENTS, 20), anywhere(model, store, repair="full", **settings))
    found, report = prefill(model, store, shuffled_prompt(), repair="full", **settings)
    assert close(found, logits(model, shuffled_prompt()))
    assert report.recomputed > 900
    assert report.exact


def test_a_dry_run_tells_of_rounding(model, store):
    generate(model, IDS, RedisChunkCache(model, store, codec="safetensors-int8"))
    cache = RedisChunkCache(model, store, codec="safetensors-int8")
    explanation = cache.explain(IDS)
    assert explanation.reused == 299
    assert not explanation.exact
    assert "rounded to safetensors-int8" in str(explanation)
    assert explanation.to_dict()["lossy"] == "safetensors-int8"
    assert cache.explain(random_ids(300, seed=5)).exact
    audit = cache.audit(IDS, new_tokens=4)
    assert not audit.report.exact
    assert 0 < max(audit.kl.flatten().tolist()) < 0.01
