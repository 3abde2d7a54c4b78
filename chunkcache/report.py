"""Report: what the cache did with one prompt, in numbers, in words and in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from chunkcache.errors import ChunkCacheError
from chunkcache.gain import NO_GAIN
from chunkcache.prompt_map import STYLE, MapRow, html_map, terminal_map
from chunkcache.tokens.chunking import Tokens
from chunkcache.tokens.plan import Kind, Span
from chunkcache.tokens.token_text import Decoder, check_decoder, span_texts, visible

if TYPE_CHECKING:
    import pandas


class Counts:
    """Token counts by kind."""

    __slots__ = ()

    def _spans(self) -> Iterable[Span]:
        raise NotImplementedError

    def count(self, kind: Kind) -> int:
        """Tokens of that kind."""
        return sum(span.tokens for span in self._spans() if span.kind is kind)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, padding not counted."""
        return sum(span.tokens for span in self._spans())

    @property
    def reused(self) -> int:
        """Tokens whose K/V were taken as they are; one may have been computed again, as a check."""
        return self.count(Kind.REUSED)

    @property
    def moved(self) -> int:
        """Tokens whose K/V were taken from another position."""
        return self.count(Kind.MOVED)

    @property
    def recomputed(self) -> int:
        """Tokens that were found but computed again to repair a move."""
        return self.count(Kind.RECOMPUTED)

    @property
    def computed(self) -> int:
        """Tokens that the model computed."""
        return self.count(Kind.COMPUTED)


@dataclass(slots=True)
class RowReport(Counts):
    """What happened to the tokens of one row of the batch.

    Attributes:
        spans: Neighbouring tokens by their fate.
        ids: Their token ids, `[tokens]`, or `None` where the prompt came without. For drawing: they
            are in no `to_dict()` and no `repr`.
    """

    spans: list[Span] = field(default_factory=list)
    ids: Tokens | None = field(default=None, repr=False, compare=False)

    def _spans(self) -> Iterable[Span]:
        return self.spans


_TIMES = ("lookup_ms", "read_ms", "overlapped_ms", "move_ms", "prefill_ms")
_BYTES = ("bytes_read", "bytes_saved", "bytes_written", "bytes_dropped")


@dataclass(slots=True)
class Report(Counts):
    """What the cache did with the last prompt.

    Token counts are sums over the rows of the batch; `reused + moved + recomputed + computed`
    is `prompt_tokens`.

    Attributes:
        rows: One `RowReport` per row of the batch.
        bytes_read: Bytes of blobs read from the store.
        bytes_saved: Bytes that the codec saved in reading them.
        bytes_written: Bytes of blobs handed to the store, tokens of the answer included.
        bytes_dropped: Bytes that the store did not take: its write queue was full, or it failed.
        lookup_ms: Hashing the prompt and asking the store what it has, in milliseconds.
        read_ms: Waiting for blobs to be read, checked and in the layers.
        overlapped_ms: Reading that went on while the model computed, and cost no time.
        move_ms: Rotating moved keys to their new position.
        prefill_ms: Computing the rest of the prompt.
        charged: Cost of repairing moved tokens, probe passes included, in tokens computed.
        approximate: K/V of moved tokens are held, from this prompt or from one before it.
        lossy: The codec that has rounded K/V that are held, or `""`.
        reproducible: With which pieces, versions and threads the same bits come again, or `""`.
        store_errors: Failed calls to the store.
        causes: The same by cause (`StoreError.cause`).
        errors: What went wrong, each cause once.
        skipped: Why the cache fell back to normal prefill, or `""`.
        not_stored: Why nothing more is stored of what this object holds, where that was found out
            once the prompt was computed, or `""`.
        tokenizer: What shows the prompt's text where the report is drawn.
    """

    rows: list[RowReport] = field(default_factory=list)
    bytes_read: int = 0
    bytes_saved: int = 0
    bytes_written: int = 0
    bytes_dropped: int = 0
    lookup_ms: float = 0.0
    read_ms: float = 0.0
    overlapped_ms: float = 0.0
    move_ms: float = 0.0
    prefill_ms: float = 0.0
    charged: float = 0.0
    approximate: bool = False
    lossy: str = ""
    reproducible: str = ""
    store_errors: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    skipped: str = ""
    not_stored: str = ""
    tokenizer: Decoder | None = field(default=None, repr=False, compare=False)

    def _spans(self) -> Iterable[Span]:
        return (span for row in self.rows for span in row.spans)

    @property
    def exact(self) -> bool:
        """Whether the outputs are those of a run without the cache."""
        return not self.approximate and not self.lossy

    @property
    def variants(self) -> dict[str, str]:
        """Which chunks have served as moved text, by hash: their variant and old position."""
        moved = (span for span in self._spans() if span.kind is Kind.MOVED)
        return {span.key: span.origin for span in moved}

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """One mapping per span: row, start, stop, kind, key, origin, reason."""
        return [
            {"row": index, **asdict(span), "kind": str(span.kind)}
            for index, row in enumerate(self.rows)
            for span in row.spans
        ]

    def note_error(self, error: Exception) -> None:
        """Count a failed call to the store."""
        self.store_errors += 1
        cause = error.cause if isinstance(error, ChunkCacheError) else "other"
        self.causes[cause] = self.causes.get(cause, 0) + 1
        # A store that is not asked says why: with the words of the error before it.
        if not any(known in str(error) for known in self.errors):
            self.errors.append(str(error))

    def add(self, other: Report) -> None:
        """Add what another report has counted of a part of the same prompt, its errors included."""
        for name in (*_TIMES, *_BYTES, "store_errors"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for cause, count in other.causes.items():
            self.causes[cause] = self.causes.get(cause, 0) + count
        self.errors += [error for error in other.errors if error not in self.errors]

    def again(self, past: Sequence[int]) -> Report:
        """A report for doing the same forward again: what went wrong is kept.

        Args:
            past: Tokens of each row that came before this forward; their spans are kept too.
        """
        rows = [
            RowReport(
                [span for span in row.spans if span.start < start],
                None if row.ids is None else row.ids[:start],
            )
            for row, start in zip(self.rows, past, strict=False)
            if any(past)
        ]
        times = ("lookup_ms", "read_ms", "prefill_ms")
        kept = (*times, "bytes_read", "store_errors", "causes", "errors", "tokenizer")
        return Report(rows, **{name: getattr(self, name) for name in kept})

    def to_dict(self) -> dict[str, Any]:
        """All numbers, the per-chunk rows and the rows of the batch, ready for JSON. No text."""
        counts = ("prompt_tokens", "reused", "moved", "recomputed", "computed")
        others = self.__dataclass_fields__.keys() - {"rows", "tokenizer"}
        plain = {name: getattr(self, name) for name in sorted(others)}
        return {
            **{name: getattr(self, name) for name in counts},
            **plain,
            "causes": dict(self.causes),
            "errors": list(self.errors),
            "exact": self.exact,
            "rows": [{name: getattr(row, name) for name in counts} for row in self.rows],
            "chunks": self.chunks,
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """The per-chunk rows as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        columns = ["row", "start", "stop", "kind", "key", "origin", "reason"]
        return data_frame(self.chunks, columns)

    def __str__(self) -> str:
        if not self.rows:
            return f"no prompt yet: {self.skipped}" if self.skipped else "no prompt yet"
        parts = [f"{self.reused:,} of {self.prompt_tokens:,} prompt tokens reused"]
        parts += [
            f"{count:,} {kind}"
            for kind in (Kind.MOVED, Kind.RECOMPUTED, Kind.COMPUTED)
            if (count := getattr(self, kind))
        ]
        if self.bytes_read:
            saved = f" ({self.bytes_saved / 1e6:,.1f} MB saved)" if self.bytes_saved else ""
            parts.append(f"{self.bytes_read / 1e6:,.1f} MB read{saved}")
        if self.bytes_written:
            parts.append(f"{self.bytes_written / 1e6:,.1f} MB to the store")
        move = f"+ move {self.move_ms:.1f} " if self.move_ms else ""
        parts.append(
            f"lookup {self.lookup_ms:.1f} + read {self.read_ms:.1f} {move}"
            f"+ prefill {self.prefill_ms:.1f} ms"
        )
        if self.reproducible:
            parts.append(f"reproducible: {self.reproducible}")
        if self.lossy:
            parts.append(f"approximate: K/V rounded to {self.lossy}")
        if any(span.reason == NO_GAIN for span in self._spans()):
            parts.append(NO_GAIN)
        if self.skipped:
            parts.append(f"normal prefill: {self.skipped}")
        if self.not_stored:
            parts.append(f"nothing more stored: {self.not_stored}")
        if self.bytes_dropped:
            full = ": the write queue is full (write_queue_bytes), or the store (bytes= in its URL)"
            why = "" if self.errors else full
            parts.append(f"{self.bytes_dropped / 1e6:,.1f} MB not stored{why}")
        if self.errors:
            errors = "store error" if self.store_errors == 1 else "store errors"
            parts.append(f"{self.store_errors} {errors}: {'; '.join(self.errors)}")
        return ", ".join(parts)

    def show(self, tokenizer: Decoder | None = None) -> None:
        """Draw the prompt, its tokens coloured by what happened to them: in Jupyter or a terminal.

        Args:
            tokenizer: The model's, which shows the tokens as text. Default: the one that the cache
                was made with; without one, there is a bar and no text.

        Raises:
            SettingError: This is no tokenizer.
        """
        from rich.console import Console

        rows = self._map(tokenizer)
        console = Console()
        if console.is_jupyter:
            from IPython.display import display

            display({"text/html": self._html(rows), "text/plain": str(self)}, raw=True)
            return
        coloured = console.color_system is not None
        console.print(terminal_map(rows, min(console.width, 100), coloured=coloured))
        console.print(f"\n{visible(str(self))}", markup=False, highlight=False)

    def to_html(self, tokenizer: Decoder | None = None) -> str:
        """The same as HTML for a page of one's own; Jupyter shows it by itself.

        Args:
            tokenizer: As in `show`.
        """
        return self._html(self._map(tokenizer))

    def _repr_html_(self) -> str:
        return self.to_html()

    def _map(self, tokenizer: Decoder | None) -> list[MapRow]:
        if tokenizer is not None:
            check_decoder(tokenizer)
        tokenizer = tokenizer or self.tokenizer
        return [
            MapRow(row.spans)
            if tokenizer is None or row.ids is None
            else MapRow(row.spans, span_texts(tokenizer, row.ids, row.spans))
            for row in self.rows
        ]

    def _html(self, rows: list[MapRow]) -> str:
        return f'<div style="{STYLE}">{html_map(rows)}<div>{escape(str(self))}</div></div>'


def data_frame(rows: Sequence[Any], columns: Sequence[str]) -> pandas.DataFrame:
    """Rows as a pandas DataFrame, under these columns even if there are none.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe() needs the package pandas: pip install pandas") from error
    return pandas.DataFrame(rows, columns=list(columns))
