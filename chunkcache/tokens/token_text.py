"""Token ids to texts that can be shown: of each span of a prompt, what it says.

Tokens are anybody's text. What would act on a terminal or reorder a page (control characters, bidi
overrides) is replaced by a picture of itself. So is what a store or a file says of itself: whoever
can write there could write that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

from chunkcache.errors import SettingError

if TYPE_CHECKING:
    from chunkcache.tokens.chunking import Tokens
    from chunkcache.tokens.plan import Span

_BEFORE = (
    8  # tokens that are decoded along, so that a span's first one reads as it does in the text
)
_BROKEN = "\ufffd"  # what decoders put for a part of a character
_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(
        (
            *range(0x80, 0xA0),  # C1 controls
            *range(0x202A, 0x202F),  # bidi embeddings and overrides
            *range(0x2066, 0x206A),  # bidi isolates
            *range(0xD800, 0xE000),  # surrogates, which cannot be written
        ),
        ord(_BROKEN),
    ),
}
_LINE_ENDS = {ord("\t"): 0x2409, ord("\n"): 0x240A, 0x2028: 0x240A, 0x2029: 0x240A}


class Decoder(Protocol):
    """A Transformers tokenizer, or whatever else turns ids into text as it does."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """The text of these ids."""


def check_decoder(tokenizer: Any) -> None:
    """Raise SettingError if this is no tokenizer."""
    if not hasattr(tokenizer, "decode"):
        raise SettingError(
            f"tokenizer={tokenizer!r} must be the model's Transformers tokenizer, such as "
            "AutoTokenizer.from_pretrained(...)"
        )


def span_texts(tokenizer: Decoder, ids: Tokens, spans: Sequence[Span]) -> list[str]:
    """The text of each of a row's neighbouring spans; joined, they are the text of all.

    A character whose tokens lie in two spans stands in the second one.

    Args:
        tokenizer: What the ids are of.
        ids: `[tokens]`, from the first token of the first span on.
        spans: The spans.
    """

    def decoded(start: int, stop: int) -> str:
        text: str = tokenizer.decode(
            ids[start:stop].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    texts = []
    for span in spans:
        start, stop = span.start - spans[0].start, span.stop - spans[0].start
        context = max(start - _BEFORE, 0)
        before, through = decoded(context, start).rstrip(_BROKEN), decoded(context, stop)
        if span is not spans[-1]:
            through = through.rstrip(_BROKEN)
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(before, through, strict=False))
        texts.append(through[sum(1 for _ in alike) :])
    return texts


def visible(text: str) -> str:
    """A text that only can be read: tabs and line ends stay, other controls become pictures."""
    return text.translate(_PICTURES)


def shown(text: str) -> str:
    """A text that only can be read and takes one line: line ends and tabs are pictures, too."""
    return visible(text).translate(_LINE_ENDS)
