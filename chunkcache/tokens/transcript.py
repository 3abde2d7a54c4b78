"""Transcript: the token ids whose K/V a cache object holds, row by row.

It follows the layers through everything Transformers does to them (append, crop, reorder,
repeat, select), so that K/V are never taken for those of other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

UNNAMED = -1  # in place of an id


@dataclass(frozen=True, slots=True)
class Padding:
    """Left padding of rows, on a device.

    Attributes:
        columns: How many there are in each row, `[rows, 1]`.
        is_any: Whether there are any; perhaps also where only rows that are gone had any.
    """

    columns: Tensor
    is_any: bool

    @classmethod
    def of(cls, pads: list[int], device: torch.device) -> Padding:
        """That of rows with so many columns of padding."""
        if not any(pads):  # which no number has to be brought to the device for
            return cls(torch.zeros((len(pads), 1), dtype=torch.long, device=device), False)
        return cls(torch.tensor(pads, device=device)[:, None], True)


class Transcript:
    """Token ids of each row, left padding included, as `[batch, columns]`.

    Ids are kept on the device they came from and brought to the CPU only when they are read: a
    step of decoding must not wait for it. So is which rows were taken of others.

    Attributes:
        pieces: The ids in order, `[batch, columns]` each.
        pads: Columns of left padding of each row.
        inexact_from: Per row, the column from which on K/V are not those of a run without the
            cache; `None` if all are.
        lossy_from: The column from which on K/V may have been rounded by a lossy codec, or were
            computed behind such; `None` if none were.
        text_until: The column from which on mask or positions are not those of text with padding on
            its left alone, so that ids do not name the K/V; `None` if all are.
    """

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self._pads: list[int] = []
        self._inexact_from: list[int | None] = []
        self._rows: Tensor | None = None  # of the two lists, those that are now; if not all
        self._padding: Padding | None = None
        self.lossy_from: int | None = None
        self.text_until: int | None = None

    @property
    def pads(self) -> list[int]:
        self._settle_rows()
        return self._pads

    @property
    def inexact_from(self) -> list[int | None]:
        self._settle_rows()
        return self._inexact_from

    @inexact_from.setter
    def inexact_from(self, columns: list[int | None]) -> None:
        self._settle_rows()
        self._inexact_from = columns

    def _settle_rows(self) -> None:
        if self._rows is not None:
            rows, self._rows = self._rows.tolist(), None
            self._pads = [self._pads[row] for row in rows]
            self._inexact_from = [self._inexact_from[row] for row in rows]

    def padding(self, device: torch.device) -> Padding:
        """The padding of all rows, brought to a device once."""
        if self._padding is None or self._padding.columns.device != device:
            self._padding = Padding.of(self.pads, device)
        return self._padding

    @property
    def columns(self) -> int:
        """Columns recorded."""
        return sum(piece.shape[1] for piece in self.pieces)

    @property
    def is_exact(self) -> bool:
        """Whether all K/V are those of a run without the cache."""
        return all(end is None for end in self.inexact_from)

    def start(self, pads: list[int]) -> None:
        """Begin anew with rows that have so many columns of left padding."""
        self.pieces, self._pads = [], list(pads)
        self._inexact_from = [None] * len(pads)
        self._rows = self._padding = self.lossy_from = self.text_until = None

    def more_padding(self, pads: list[int]) -> None:
        """Rows that are nothing but padding so far may go on with it."""
        columns = self.columns
        pairs = zip(self.pads, pads, strict=True)
        self._pads = [now if before == columns else before for before, now in pairs]
        self._padding = None

    def append(self, ids: Tensor) -> None:
        """Record `[batch, new]` ids."""
        if ids.shape[1]:
            self.pieces.append(ids.detach().clone())  # callers write the next token into theirs

    def append_unnamed(self, columns: int) -> None:
        """Record columns of which there are no ids: those of embeddings."""
        self.append(torch.full((len(self._pads), columns), UNNAMED))

    @property
    def is_named(self) -> bool:
        """Whether there are ids of all columns."""
        return not bool((self.ids() == UNNAMED).any())

    def ids(self) -> Tensor:
        """All ids, `[batch, columns]`, on the CPU."""
        if not self.pieces:
            return torch.empty((len(self.pads), 0), dtype=torch.long)
        if len(self.pieces) > 1 or self.pieces[0].device.type != "cpu":
            together = groupby(self.pieces, key=lambda piece: piece.device)
            brought = [torch.cat([*pieces], dim=1).cpu() for _, pieces in together]
            self.pieces = [torch.cat(brought, dim=1)]
        return self.pieces[0]

    def crop(self, columns: int) -> None:
        """Forget all but the first columns."""
        if self.lossy_from is not None and self.lossy_from >= columns:
            self.lossy_from = None
        if self.text_until is not None and self.text_until >= columns:
            self.text_until = None
        if (spare := self.columns - columns) > 0:
            while self.pieces and spare >= self.pieces[-1].shape[1]:
                spare -= self.pieces.pop().shape[1]
            if spare:
                self.pieces[-1] = self.pieces[-1][:, :-spare]
            self._inexact_from = [
                None if end is None or end >= columns else end for end in self._inexact_from
            ]

    def exact_lengths(self, certain: int) -> list[int]:
        """Tokens from the start of each row whose K/V may be kept under exact keys.

        `certain` is the number of columns that nobody will take back.
        """
        return [
            self._exact_length(certain, *row)
            for row in zip(self.pads, self.inexact_from, strict=True)
        ]

    def distinct_lengths(self, certain: int) -> list[int]:
        """The same of rows that differ, perhaps some that are gone. Waits for nothing."""
        rows = sorted({*zip(self._pads, self._inexact_from, strict=True)}, key=str)
        return [self._exact_length(certain, *row) for row in rows]

    def _exact_length(self, certain: int, pad: int, end: int | None) -> int:
        last = certain if self.text_until is None else min(certain, self.text_until)
        return max((last if end is None else min(end, last)) - pad, 0)

    def take_rows(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        if not self._pads:
            return  # nothing is recorded of tokens that nobody may name
        if self.pieces:
            joined = torch.cat([piece.to(rows.device) for piece in self.pieces], dim=1)
            self.pieces = [joined[rows]]
        if self._padding is not None:
            first = self._padding.columns
            self._padding = Padding(first[rows.to(first.device)], self._padding.is_any)
        before = self._rows
        if before is None:
            before = torch.arange(len(self._pads), device=rows.device)
        self._rows = before.to(rows.device)[rows]
        if len({*zip(self._pads, self._inexact_from, strict=True)}) == 1:  # whichever they are
            self._pads, count = self._pads[:1] * len(self._rows), len(self._rows)
            self._inexact_from, self._rows = self._inexact_from[:1] * count, None
        elif rows.device.type == "cpu":
            self._settle_rows()

    def common_columns(self, ids: Tensor, pads: list[int]) -> int:
        """Columns from the first on that are the same in `ids` `[batch, other]` in every row."""
        mine = self.ids()
        if pads != self.pads or ids.shape[0] != mine.shape[0]:
            return 0
        columns = min(mine.shape[1], ids.shape[1])
        same = (mine[:, :columns] == ids[:, :columns].cpu()).all(dim=0)
        return int(same.long().cumprod(dim=0).sum())
