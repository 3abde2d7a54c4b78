"""add_documents: K/V of documents into the store, ahead of any prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from chunkcache.errors import SettingError, StoreError
from chunkcache.library.compiler import Compiler, Document
from chunkcache.stores.base import ChunkStore
from chunkcache.tokens.chunking import Tokens
from chunkcache.tokens.texts import TextOrIds, TextReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME_TOKENS = 32  # a document that begins with so many tokens of the filler is that text
PORTION_BATCHES = 8  # looked up together; enough for rows of like length to meet


@dataclass(frozen=True, slots=True)
class DocumentFailure:
    """A document that is not in the store: its place among those given, from 0, and why."""

    document: int
    reason: str


@dataclass(frozen=True, slots=True)
class DocumentsSummary:
    """What `add_documents` did. `documents` is `added + skipped + len(failures)`.

    Attributes:
        documents: Documents taken from the iterable.
        added: Documents of which something was missing and is in the store now.
        skipped: Documents that were in the store already, or were given twice.
        tokens: Tokens of the documents that are in the store now, the prefix not counted.
        computed: Tokens that the model computed, the prefix counted.
        bytes_written: Bytes of K/V handed to the store.
        failures: The documents that are not in the store, in the order given.
        stopped: Why the run ended before the last document, or `""`.
    """

    documents: int
    added: int
    skipped: int
    tokens: int
    computed: int
    bytes_written: int
    failures: tuple[DocumentFailure, ...] = ()
    stopped: str = ""

    def __str__(self) -> str:
        parts = [f"{self.added:,} of {self.documents:,} documents added"]
        if self.skipped:
            parts.append(f"{self.skipped:,} skipped as known")
        parts.append(f"{self.tokens:,} tokens, {self.computed:,} computed")
        parts.append(f"{self.bytes_written / 1e6:,.1f} MB to the store")
        if self.failures:
            first, text = self.failures[0], f"{len(self.failures):,} failed"
            if first.reason != self.stopped:
                text += f", the first is document {first.document}: {first.reason}"
            parts.append(text)
        if self.stopped:
            parts.append(f"stopped: {self.stopped}")
        return ", ".join(parts)


def add_documents(
    model: nn.Module,
    store: ChunkStore | str | list[str] | None,
    documents: Iterable[TextOrIds],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prefix: TextOrIds | None = None,
    filler: TextOrIds | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
    **settings: Any,
) -> DocumentsSummary:
    """Compute the K/V of documents once, ahead of time, for reuse at any position of any prompt.

    ```python
    chunkcache.add_documents(model, "redis://localhost:6379/0", texts, tokenizer=tokenizer)
    cache = RedisChunkCache(model, "redis://localhost:6379/0", reuse="anywhere")
    ```

    K/V that were kept from a user's prompt carry traces of all text before them in that prompt, and
    take them to whoever reuses them. Here each document is computed behind `prefix` alone: its K/V
    hold nothing of any user's text nor of other documents, so they may be shared more widely. (A
    cache stores its own prompts too, under the namespace in which it finds the documents.)

    In prompts, documents seldom stand alone. With `filler`, a text like them, such as one of them,
    each is computed behind prefix and filler: its K/V are nearer to those in a prompt of several
    documents then, and carry traces of the filler, so choose one that all who use them may know.

    A prompt that begins with prefix and document, token by token, reuses their whole chunks
    exactly, whatever `reuse` is, unless there is a filler between them; elsewhere in a prompt they
    are moved, which needs `reuse="anywhere"`. They are found by their tokens, so put documents into
    prompts where the tokenizer does not join them with what stands beside them, as between empty
    lines. A document of fewer than 32 tokens is never moved.

    What such a run has left in the store is not computed again. So one that was killed is started
    again as it was and goes on where it ended, and a document that is there in part is completed.
    What is stored is marked: caches with `variants="prepared"` move nothing else.

    Args:
        model: The model, in evaluation mode. A PEFT or compiled wrapper is looked through.
        store: As in `RedisChunkCache`.
        documents: Texts, or token ids `[tokens]`; taken one by one, so a generator of any length
            will do. A document that is empty, too short to make a chunk or too long for the model's
            positions is left out, and named in the summary.
        tokenizer: The model's tokenizer, for texts. It adds no special tokens to documents.
        prefix: What stands before every document. `None`: what the tokenizer puts before a prompt,
            or else the BOS token of tokenizer or model, if there is one. A text: what the tokenizer
            puts before a prompt, once, and the text. Token ids: these alone.
        filler: What stands between prefix and document while it is computed, a text or token ids:
            its last 128 to 255 tokens (with the default `chunk_size`), repeated where it is
            shorter, so that the document begins a chunk. `None` or empty: nothing. The document
            that is the filler is computed without it, and so is one that the model has no
            positions for then.
        batch_tokens: Tokens that go through the model at once, prefix and padding included. A
            longer document is computed alone, in pieces of about that many.
        progress: Show a progress bar.
        settings: As in `Settings`, the same as those of the caches that shall find the documents.
            `tags` and `pin` are those of every chunk that is written now. When the store fails, the
            run ends and the summary says why; with `on_error="raise"` it raises.

    Raises:
        SettingError: A setting or a document cannot work, such as a text without `tokenizer`.
        UnsupportedModelError: K/V of this model cannot be reused at another position.
        UnsupportedCallError: The model is in training mode, or hooks change what it computes.
        StoreError: The store failed or is too small, with `on_error="raise"`.
    """
    _check(documents, batch_tokens, settings)
    compiler = Compiler(model, store, {**settings, "reuse": "anywhere"}, batch_tokens)
    reader = TextReader(compiler.model, tokenizer)
    begin = reader.read_prefix(prefix)
    text = begin[:0] if filler is None else reader.read(filler, "filler")
    front = _Front(begin, text, compiler.behind(begin, text), reader.longest)
    total = len(documents) if isinstance(documents, Sized) else None
    with tqdm(total=total, desc="documents", unit="doc", disable=not progress) as bar:
        adding = _Adding(compiler, bar)
        try:
            # First, so that the rows of the first batch find it, too.
            alone = compiler.document(begin[:0], front.before(begin[:0]))
            compiler.complete(compiler.look([alone]), lambda _: None)
            for portion in adding.portions(documents, reader, front):
                adding.add(portion)
        except StoreError as error:
            if compiler.settings.on_error == "raise":
                raise
            adding.stopped = str(error)
    return adding.summary()


def _check(documents: object, batch_tokens: object, settings: Mapping[str, Any]) -> None:
    if settings.get("reuse", "anywhere") != "anywhere":
        raise SettingError(
            f"reuse={settings['reuse']!r} is not for add_documents, which stores for every mode: "
            "leave it out, and give it to the cache that looks for the documents"
        )
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise SettingError(f"batch_tokens={batch_tokens!r} must be a whole number of at least 1")
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise SettingError(
            "documents must be an iterable of texts or of token ids, not one "
            f"{type(documents).__name__}: put a single document into a list"
        )


@dataclass(frozen=True, slots=True)
class _Front:
    """What stands before documents. All are token ids, `[tokens]`."""

    prefix: Tokens
    filler: Tokens
    both: Tokens
    longest: float

    def before(self, ids: Tokens) -> Tokens:
        """Prefix and filler, or where that is too long or the same text, the prefix alone."""
        fits = len(self.both) + max(len(ids), 1) <= self.longest
        # Behind itself, a text would be read as a repetition.
        itself = len(ids) and ids[:SAME_TOKENS].tobytes() in self.filler.tobytes()
        return self.both if fits and not itself else self.prefix


class _Adding:
    """Reads documents portion by portion, and keeps count of what becomes of them."""

    def __init__(self, compiler: Compiler, bar: tqdm[Any]) -> None:
        self.compiler = compiler
        self.bar = bar
        self.documents = self.added = self.skipped = self.tokens = 0
        self.failures: list[DocumentFailure] = []
        self.stopped = ""

    def summary(self) -> DocumentsSummary:
        """What was done so far."""
        return DocumentsSummary(
            self.documents,
            self.added,
            self.skipped,
            self.tokens,
            self.compiler.computed,
            self.compiler.bytes_written,
            tuple(sorted(self.failures, key=lambda failure: failure.document)),
            self.stopped,
        )

    def portions(
        self, documents: Iterable[TextOrIds], reader: TextReader, front: _Front
    ) -> Iterator[dict[Document, list[int]]]:
        """Documents that can be added, with their places; equal ones have several."""
        portion: dict[tuple[str, ...], tuple[Document, list[int]]] = {}
        tokens = 0
        for place, given in enumerate(documents):
            ids = reader.read(given, f"document {place}")
            self.documents += 1
            length = len(front.prefix) + len(ids)
            if length > reader.longest:
                why = f"{length:,} tokens with its prefix are more than the model's positions, "
                self._fail(place, f"{why}{reader.longest:,}: split it")
                continue
            document = self.compiler.document(front.before(ids), ids)
            if not document.chunks:
                self._fail(place, "it is too short to make a chunk" if len(ids) else "it is empty")
                continue
            names = tuple(chunk.hash for chunk in document.chunks)
            _, places = portion.setdefault(names, (document, []))
            if places:
                self.bar.update()
            places.append(place)
            tokens += len(document.row)
            if tokens >= PORTION_BATCHES * self.compiler.batch_tokens:
                yield dict(portion.values())
                portion, tokens = {}, 0
        if portion:
            yield dict(portion.values())

    def add(self, portion: Mapping[Document, list[int]]) -> None:
        """See to it that the store has these documents.

        Raises:
            StoreError: It failed, or has not kept them.
            UnsupportedCallError: The model's K/V cannot be stored.
        """
        lacking, failure = set(portion), None
        try:
            lacking = set(self.compiler.look(list(portion)))
            self.bar.update(sum(not doc.incomplete for doc in portion))
            self.compiler.complete([doc for doc in portion if doc in lacking], self.bar.update)
        except StoreError as error:
            failure = error
        for document, places in portion.items():
            if failure and document in lacking:
                self.failures += [DocumentFailure(place, str(failure)) for place in places]
                continue
            self.added += document in lacking
            self.skipped += len(places) - (document in lacking)
            self.tokens += len(places) * (len(document.row) - document.begin)
        if failure:
            raise failure

    def _fail(self, place: int, reason: str) -> None:
        self.failures.append(DocumentFailure(place, reason))
        self.bar.update()
