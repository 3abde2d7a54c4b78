"""Transcript: the token ids whose K/V a cache object holds, row by row.

It follows the layers through everything Transformers does to them (append, crop, reorder,
repeat, select), so that K/V are never taken for those of other tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNNAMED = -1  # in place of an id


class Transcript:
    """Token ids of each row, left padding included, as `[batch, columns]`.

    Ids are kept on the device they came from and brought to the CPU only when they are read: a
    step of decoding must not wait for it.

    Attributes:
        pads: Columns of left padding of each row.
        inexact_from: Per row, the column from which on K/V are not those of a run without the
            cache; `None` if all are.
        lossy_from: The column from which on K/V may have been rounded by a lossy codec, or were
            computed behind such; `None` if none were.
        text_until: The column from which on mask or positions are not those of text with padding on
            its left alone, so that ids do not name the K/V; `None` if all are.
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self.pads: list[int] = []
        self.inexact_from: list[int | None] = []
        self.lossy_from: int | None = None
        self.text_until: int | None = None

    @property
    def columns(self) -> int:
        """Columns recorded."""
        return sum(piece.shape[1] for piece in self._pieces)

    @property
    def is_exact(self) -> bool:
        """Whether all K/V are those of a run without the cache."""
        return all(end is None for end in self.inexact_from)

    def start(self, pads: list[int]) -> None:
        """Begin anew with rows that have so many columns of left padding."""
        self._pieces, self.pads = [], list(pads)
        self.inexact_from = [None] * len(pads)
        self.lossy_from = self.text_until = None

    def more_padding(self, pads: list[int]) -> None:
        """Rows that are nothing but padding so far may go on with it."""
        columns = self.columns
        pairs = zip(self.pads, pads, strict=True)
        self.pads = [now if before == columns else before for before, now in pairs]

    def append(self, ids: Tensor) -> None:
        """Record `[batch, new]` ids."""
        if ids.shape[1]:
            self._pieces.append(ids.detach().clone())  # callers write the next token into theirs

    def append_unnamed(self, columns: int) -> None:
        """Record columns of which there are no ids: those of embeddings."""
        self.append(torch.full((len(self.pads), columns), UNNAMED))

    @property
    def is_named(self) -> bool:
        """Whether there are ids of all columns."""
        return not bool((self.ids() == UNNAMED).any())

    def ids(self) -> Tensor:
        """All ids, `[batch, columns]`, on the CPU."""
        if not self._pieces:
            return torch.empty((len(self.pads), 0), dtype=torch.long)
        if len(self._pieces) > 1 or self._pieces[0].device.type != "cpu":
            joined = torch.cat([p.to(self._pieces[-1].device) for p in self._pieces], dim=1)
            self._pieces = [joined.cpu()]
        return self._pieces[0]

    def crop(self, columns: int) -> None:
        """Forget all but the first columns."""
        if self.lossy_from is not None and self.lossy_from >= columns:
            self.lossy_from = None
        if self.text_until is not None and self.text_until >= columns:
            self.text_until = None
        if columns < self.columns:
            self._pieces = [self.ids()[:, :columns]]
            self.inexact_from = [
                None if end is None or end >= columns else end for end in self.inexact_from
            ]

    def exact_lengths(self, certain: int) -> list[int]:
        """Tokens from the start of each row whose K/V may be kept under exact keys.

        `certain` is the number of columns that nobody will take back.
        """
        last = certain if self.text_until is None else min(certain, self.text_until)
        return [
            max((last if end is None else min(end, last)) - pad, 0)
            for pad, end in zip(self.pads, self.inexact_from, strict=True)
        ]

    def take_rows(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        if not self.pads:
            return  # nothing is recorded of tokens that nobody may name
        rows = rows.cpu()
        self._pieces = [self.ids()[rows]]
        taken: list[int] = torch.arange(len(self.pads))[rows].tolist()
        self.pads = [self.pads[row] for row in taken]
        self.inexact_from = [self.inexact_from[row] for row in taken]

    def common_columns(self, ids: Tensor, pads: list[int]) -> int:
        """Columns from the first on that are the same in `ids` `[batch, other]` in every row."""
        mine = self.ids()
        if pads != self.pads or ids.shape[0] != mine.shape[0]:
            return 0
        columns = min(mine.shape[1], ids.shape[1])
        same = (mine[:, :columns] == ids[:, :columns].cpu()).all(dim=0)
        return int(same.long().cumprod(dim=0).sum())
