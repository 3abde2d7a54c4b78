"""Explanation: what a cache would find of a prompt, as data, as text and in HTML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from chunkcache.insight.seams import Seam
from chunkcache.prompt_map import STYLE, MapRow, html_map
from chunkcache.report import Counts, data_frame
from chunkcache.tokens.plan import Kind, Span
from chunkcache.tokens.token_text import shown

if TYPE_CHECKING:
    import pandas

_MOST_LINES = 40  # of a table


@dataclass(frozen=True, slots=True)
class Finding(Span):
    """Neighbouring tokens of one row with the same fate, as far as it can be told beforehand.

    Some of the tokens said to be moved will be computed again, and in a batch what stands in the
    same columns; which, only a run can tell.

    Attributes:
        row: Row of the batch.
        bytes: Bytes of the chunk's blob in the store, 0 if it is not there.
        old_start: Where the first token stood when the K/V in the store were computed, if that
            chunk was found by its text.
        variant: Which of the variants of its text that chunk is, likewise.
    """

    row: int = 0
    bytes: int = 0
    old_start: int | None = None
    variant: str = ""

    @property
    def hit(self) -> bool:
        """Whether K/V of these tokens would be taken from the store."""
        return self.kind is not Kind.COMPUTED

    def part(self, start: int, stop: int) -> Finding:
        """The same of fewer tokens."""
        if self.old_start is None:
            return replace(self, start=start, stop=stop)
        old = self.old_start + start - self.start
        origin = f"{self.variant}, position {old}" if self.variant else f"position {old}"
        return replace(self, start=start, stop=stop, old_start=old, origin=origin)


@dataclass(frozen=True, slots=True)
class Explanation(Counts):
    """What a cache that holds nothing yet would do with a prompt.

    Blobs are not read, so one that will prove damaged counts as a hit here.

    Attributes:
        chunks: The findings, row by row, from the first token to the last.
        bytes_to_read: Bytes of all blobs that would be read.
        skipped: Why the cache would fall back to normal prefill, or `""`.
        errors: What went wrong with the store.
        lossy: The codec, where it rounds K/V.
        seams: Where the same text has other tokens than in the store, if a tokenizer was given.
    """

    chunks: tuple[Finding, ...]
    bytes_to_read: int = 0
    skipped: str = ""
    errors: tuple[str, ...] = ()
    lossy: str = ""
    seams: tuple[Seam, ...] = ()

    def _spans(self) -> tuple[Finding, ...]:
        return self.chunks

    @property
    def exact(self) -> bool:
        """Whether the outputs would be those of a run without the cache."""
        return not self.moved and not (self.lossy and self.reused)

    def to_dict(self) -> dict[str, Any]:
        """All numbers and findings, ready for JSON."""
        names = ("prompt_tokens", "reused", "moved", "computed", "exact", "bytes_to_read")
        return {
            **{name: getattr(self, name) for name in names},
            "lossy": self.lossy,
            "skipped": self.skipped,
            "errors": list(self.errors),
            "chunks": [{**asdict(found), "kind": str(found.kind)} for found in self.chunks],
            "seams": [asdict(seam) for seam in self.seams],
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """The findings as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.to_dict()["chunks"], list(Finding.__dataclass_fields__))

    def _headline(self) -> str:
        parts = [f"{self.reused:,} of {self.prompt_tokens:,} prompt tokens would be reused"]
        if self.moved:
            parts.append(f"{self.moved:,} moved")
        parts.append(f"{self.computed:,} computed")
        if self.bytes_to_read:
            parts.append(f"{self.bytes_to_read / 1e6:,.1f} MB to read")
        if self.lossy and self.reused + self.moved:
            parts.append(f"approximate: K/V rounded to {self.lossy}")
        if self.skipped:
            parts.append(f"the cache would fall back to normal prefill: {self.skipped}")
        return shown(", ".join([*parts, *self.errors]))

    def _table(self) -> list[tuple[str, ...]]:
        """Neighbouring findings that differ in their chunks only, as one line of texts each."""
        lines: list[tuple[str, ...]] = [("row", "tokens", "", "chunks", "MB", "why")]
        for _, group in groupby(self.chunks, _alike):
            first, *more = group
            stop = more[-1].stop if more else first.stop
            blobs = {found.key: found.bytes for found in (first, *more) if found.key}
            why = first.reason
            if first.old_start is not None:
                why += f" (there from {first.old_start:,})"
            lines.append(
                (
                    str(first.row),
                    f"{first.start:,} to {stop:,}",
                    str(first.kind),
                    str(len(blobs) or ""),
                    f"{sum(blobs.values()) / 1e6:,.1f}" if any(blobs.values()) else "",
                    shown(why),
                )
            )
        if len(lines) > _MOST_LINES:
            left = len(lines) - _MOST_LINES
            lines[_MOST_LINES:] = [("", f"and {left:,} lines more", "", "", "", "")]
        return lines

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        rows = (
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        )
        return "\n".join([self._headline(), *rows, *map(str, self.seams)])

    def _repr_html_(self) -> str:
        """The prompt coloured by what would happen to its tokens, and the findings as a table."""
        rows = [MapRow(list(group)) for _, group in groupby(self.chunks, lambda found: found.row)]
        table = "".join(
            "<tr>"
            + "".join(f'<td style="text-align:left">{escape(t)}</td>' for t in line)
            + "</tr>"
            for line in self._table()
        )
        seams = "".join(f"<div>{escape(str(seam))}</div>" for seam in self.seams)
        return (
            f'<div style="{STYLE}">{html_map(rows)}<div>{escape(self._headline())}</div>'
            f"<table>{table}</table>{seams}</div>"
        )


def _alike(found: Finding) -> tuple[object, ...]:
    shift = None if found.old_start is None else found.start - found.old_start
    return found.row, found.kind, found.reason, shift
