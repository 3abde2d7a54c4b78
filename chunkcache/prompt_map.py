"""Prompt map: a prompt, its tokens coloured by what happened to them, in HTML and for a terminal.

The HTML is plain: no script, no style sheet, and inline styles only of the forms that JupyterLab
lets through in notebooks that are not trusted yet. Text keeps the page's colour and backgrounds are
half transparent, so that light and dark pages need not be told apart. The colours are from Okabe
and Ito's set for all kinds of colour vision (https://jfly.uni-koeln.de/color/); lines under the
text tell the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from chunkcache.tokens.plan import Kind, Span
from chunkcache.tokens.token_text import shown, visible

if TYPE_CHECKING:
    from rich.text import Text

STYLE = "font:13px/1.5 system-ui,sans-serif;max-width:60em"
_BOX = (
    "font:12px/1.8 monospace;white-space:pre-wrap;overflow-wrap:break-word;overflow-y:auto;"
    "max-height:30em;margin:6px 0;padding:4px 8px;border:1px solid rgba(128,128,128,0.5);"
    "border-radius:4px"
)
_MOST_ROWS = 8  # whose text is shown
_BORDER_FROM = 0.01  # of a bar: a border would hide what is smaller
_BAR_BORDER = "border-left:1px solid #ffffff;"
_HALF_A_CHARACTER = "·"  # the other half is in the next span


@dataclass(frozen=True, slots=True)
class _Look:
    """How tokens of a kind look: red, green and blue, and the line under them."""

    rgb: tuple[int, int, int]
    line: str

    @property
    def solid(self) -> str:
        return "#{:02x}{:02x}{:02x}".format(*self.rgb)

    @property
    def tint(self) -> str:
        return "rgba({},{},{},0.3)".format(*self.rgb)


_LOOKS = {
    Kind.REUSED: _Look((0, 158, 115), "solid"),
    Kind.MOVED: _Look((86, 180, 233), "dashed"),
    Kind.RECOMPUTED: _Look((230, 159, 0), "dotted"),
    Kind.COMPUTED: _Look((153, 153, 153), "none"),
}
COLOURS = {kind: look.solid for kind, look in _LOOKS.items()}
"""The colour of each kind, for plots."""


@dataclass(frozen=True, slots=True)
class MapRow:
    """A row of the batch: its spans, and the text of each, if that is known."""

    spans: Sequence[Span]
    texts: Sequence[str] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(span.tokens for span in self.spans)

    def counts(self) -> Counter[Kind]:
        """Tokens by kind."""
        counts: Counter[Kind] = Counter()
        for span in self.spans:
            counts[span.kind] += span.tokens
        return counts

    def opens_chunk(self) -> list[bool]:
        """For each span, whether a chunk begins with it."""
        opens = (a.key != b.key or not b.key for a, b in pairwise(self.spans))
        return [False, *opens][: len(self.spans)]

    def __str__(self) -> str:
        share = self.counts()[Kind.REUSED] / max(self.tokens, 1)
        return f"{self.tokens:,} tokens, {share:.0%} reused"


def _legend(rows: Sequence[MapRow]) -> list[tuple[Kind, str]]:
    """The kinds that occur, with their counts and shares."""
    counts = sum((row.counts() for row in rows), Counter[Kind]())
    total = max(counts.total(), 1)
    return [(k, f"{k} {counts[k]:,} ({counts[k] / total:.1%})") for k in Kind if k in counts]


# ---------------------------------------------------------------------- HTML


def html_map(rows: Sequence[MapRow]) -> str:
    """A bar per row of the batch, a legend, and the text of each row in a box that scrolls."""
    bars = "".join(_bar(index, row) for index, row in enumerate(rows))
    legend = "".join(
        f'<span style="margin-right:1em;white-space:nowrap"><span style="display:inline-block;'
        f"width:1em;height:0.8em;background-color:{_LOOKS[kind].tint};"
        f'border-bottom:2px {_LOOKS[kind].line} {COLOURS[kind]}"></span> {words}</span> '
        for kind, words in _legend(rows)
    )
    shown = [(index, row) for index, row in enumerate(rows) if row.texts is not None]
    boxes = "".join(_box(row, f"row {i}: {row}" * (len(rows) > 1)) for i, row in shown[:_MOST_ROWS])
    if len(shown) > _MOST_ROWS:
        boxes += f"<div>and {len(shown) - _MOST_ROWS} rows more</div>"
    return f"{bars}<div>{legend}</div>{boxes}"


def _bar(index: int, row: MapRow) -> str:
    total = max(row.tokens, 1)
    pieces = "".join(
        f'<span title="{_hover(span)}" style="width:{100 * span.tokens / total:.4f}%;'
        f"{_BAR_BORDER * (opens and span.tokens / total > _BORDER_FROM)}"
        f'background-color:{COLOURS[span.kind]};box-sizing:border-box"></span>'
        for span, opens in zip(row.spans, row.opens_chunk(), strict=True)
    )
    return (
        f'<div style="display:flex;height:18px;border-radius:4px;overflow:hidden;margin:4px 0" '
        f'role="img" aria-label="row {index}: {row}">{pieces}</div>'
    )


def _box(row: MapRow, heading: str) -> str:
    assert row.texts is not None
    pieces = "".join(
        f'<span title="{_hover(span)}" style="{_span_style(span.kind, opens)}">'
        f"{escape(visible(text or _HALF_A_CHARACTER))}</span>"
        for span, text, opens in zip(row.spans, row.texts, row.opens_chunk(), strict=True)
    )
    box = f'<div style="{_BOX}">{pieces}</div>'
    return f"<details><summary>{heading}</summary>{box}</details>" if heading else box


def _span_style(kind: Kind, opens_chunk: bool) -> str:
    border = "border-left:2px solid #808080;" if opens_chunk else ""
    if kind is Kind.COMPUTED:
        return f"{border}background-color:{_LOOKS[kind].tint}"
    look = _LOOKS[kind]
    return f"{border}background-color:{look.tint};border-bottom:2px {look.line} {look.solid}"


def _hover(span: Span) -> str:
    lines = [f"{span.kind}: tokens {span.start} to {span.stop}"]
    if span.origin:
        lines.append(f"from: {span.origin}")
    if span.reason:
        lines.append(f"why: {shown(span.reason)}")
    if span.key:
        lines.append(f"chunk {span.key[:12]}…")
    return escape("\n".join(lines), quote=True)


# ---------------------------------------------------------------------- terminal


def terminal_map(rows: Sequence[MapRow], width: int, *, coloured: bool) -> Text:
    """The same for a terminal that is `width` columns wide.

    Where there are no colours, the kinds are named in the text.
    """
    from rich.text import Text

    drawn = Text()
    for row in rows if coloured else ():
        for kind, cells in groupby(_cells(row, width)):
            drawn.append(" " * len(list(cells)), f"on {COLOURS[kind]}")
        drawn.append("\n")
    for kind, words in _legend(rows):
        drawn.append("  ", f"on {COLOURS[kind]}").append(f" {words}  ")
    shown = [(index, row) for index, row in enumerate(rows) if row.texts is not None]
    for index, row in shown[:_MOST_ROWS]:
        drawn.append(f"\n\nrow {index}: {row}\n" if len(rows) > 1 else "\n\n")
        drawn.append_text(_coloured(row) if coloured else Text(_named(row)))
    if len(shown) > _MOST_ROWS:
        drawn.append(f"\n\nand {len(shown) - _MOST_ROWS} rows more")
    return drawn


def _cells(row: MapRow, width: int) -> list[Kind]:
    """The kind of the token in the middle of each of `width` equal parts of a row."""
    kinds = [span.kind for span in row.spans for _ in range(span.tokens)]
    return [kinds[int((cell + 0.5) * len(kinds) / width)] for cell in range(width) if kinds]


def _coloured(row: MapRow) -> Text:
    from rich.text import Text

    assert row.texts is not None
    text = Text()
    for span, words, opens in zip(row.spans, row.texts, row.opens_chunk(), strict=True):
        style = "" if span.kind is Kind.COMPUTED else f"black on {COLOURS[span.kind]}"
        if opens:
            text.append("│", style)
        text.append(visible(words or _HALF_A_CHARACTER), style)
    return text


def _named(row: MapRow) -> str:
    assert row.texts is not None
    parts, last = [], None
    for span, words, opens in zip(row.spans, row.texts, row.opens_chunk(), strict=True):
        parts.append("│" * opens + f"[{span.kind}] " * (span.kind is not last))
        parts.append(visible(words or _HALF_A_CHARACTER))
        last = span.kind
    return "".join(parts)
