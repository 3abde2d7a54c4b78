"""Seams: where a stored text goes on in a prompt as text, but not as tokens.

A tokenizer joins characters across the border of two texts (`.` and an empty line become one
token), or sees a space before a word that had none. The tokens there are others than those of the
text alone, and from there on nothing is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os.path import commonprefix

from chunkcache.anywhere.matching import Match
from chunkcache.tokens.chunking import Tokens

LOOK = 8  # tokens on each side of a border that are compared as text

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Seam:
    """One place where the same text has other tokens.

    Attributes:
        row: Row of the batch.
        position: Where the prompt's tokens stand that differ.
        here: Their texts.
        stored: Those of the store's tokens.
    """

    row: int
    position: int
    here: tuple[str, ...]
    stored: tuple[str, ...]

    def __str__(self) -> str:
        here, stored = (" ".join(map(repr, texts)) for texts in (self.here, self.stored))
        return (
            f"tokenised differently at the seam, row {self.row}, token {self.position:,}: "
            f"{here} here, {stored} in the store"
        )


def find_seams(
    tokens: Tokens, matches: Iterable[Match], decode: Decode, row: int = 0
) -> list[Seam]:
    """The seams at the borders of what was found of a prompt, in order.

    Args:
        tokens: `[tokens]`, the row's token ids.
        matches: What was found of them by its text.
        decode: The tokenizer's.
        row: The row's number.
    """
    found = {}
    for match in matches:
        there, offset = match.chunk.tokens, match.offset
        end = offset + match.stop - match.start
        behind = _differing(tokens[match.stop : match.stop + LOOK], there[end : end + LOOK], decode)
        if behind:
            found[match.stop] = Seam(row, match.stop, *behind)
        before = _differing(
            tokens[max(match.start - LOOK, 0) : match.start][::-1],
            there[max(offset - LOOK, 0) : offset][::-1],
            decode,
            backwards=True,
        )
        if before:
            position = match.start - len(before[0])
            found.setdefault(position, Seam(row, position, *before))
    return [found[position] for position in sorted(found)]


def _differing(
    here: Tokens, there: Tokens, decode: Decode, backwards: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The texts of the tokens that differ, going away from a border; None if their text does."""
    if not len(here) or not len(there) or here[0] == there[0]:
        return None
    mine, its = ([decode([token]) for token in ids.tolist()] for ids in (here, there))
    turn = -1 if backwards else 1
    texts = [decode(ids[::turn].tolist())[::turn] for ids in (here, there)]
    common = len(commonprefix(texts))  # noqa: RUF071  (of texts, not of paths)
    if not common or common < min(len(mine[0]), len(its[0])) or not texts[0][:common].strip():
        return None
    mine, its = _until_they_meet(mine, its)
    return tuple(mine[::turn]), tuple(its[::turn])


def _until_they_meet(mine: list[str], its: list[str]) -> tuple[list[str], list[str]]:
    """The first texts of both, until both have the same length together."""
    i = j = 1
    while (difference := len("".join(mine[:i])) - len("".join(its[:j]))) != 0:
        if difference < 0 and i < len(mine):
            i += 1
        elif difference > 0 and j < len(its):
            j += 1
        else:
            break
    return mine[:i], its[:j]
