"""Texts to token ids: how documents and the prefix before them are read, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from chunkcache.errors import SettingError
from chunkcache.tokens.chunking import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TextOrIds = str | Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor
"""A text, or its token ids, `[tokens]`."""


def most_positions(config: Any) -> float:
    """Tokens that a model with this configuration has positions for, at most."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return math.inf if found is None else int(found)


def chat_inputs(tokenizer: Any, text: str) -> Any:
    """`input_ids` and `attention_mask`, `[1, tokens]`, of a user's message in the chat template.

    Raises:
        SettingError: The template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    except Exception as error:  # a template is a program, and fails as it likes
        raise SettingError(
            f"the tokenizer's chat template refuses a user's message alone "
            f"({type(error).__name__}: {error}): fix chat_template in the model's folder"
        ) from error


class TextReader:
    """Reads texts and token ids for one model.

    Args:
        model: The model that will see them.
        tokenizer: Its tokenizer; without one, token ids only can be read.

    Attributes:
        longest: Tokens that the model has positions for; infinite where none are counted (ALiBi).
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None and not callable(tokenizer):
            raise SettingError(f"tokenizer={tokenizer!r} must be a Transformers tokenizer")
        config: Any = model.config
        self._text_config = config.get_text_config(decoder=True)
        self._tokenizer = tokenizer
        self.longest = most_positions(config)

    def read(self, given: TextOrIds, name: str) -> Tokens:
        """Token ids, `[tokens]`, of a text (without special tokens) or of ids (as they are).

        Args:
            given: What to read.
            name: What to call it in an error.

        Raises:
            SettingError: It is neither, or the model does not know these ids.
        """
        if isinstance(given, str):
            given = self._tokenize(given, name)
        try:
            ids = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
        except (TypeError, ValueError):  # ragged, or of a type that numpy does not have
            ids = np.empty((0, 0))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise SettingError(
                f"{name} is neither a text nor a one-dimensional sequence of token ids, but a "
                f"{type(given).__name__}"
            )
        vocabulary = int(self._text_config.vocab_size)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise SettingError(
                f"{name} has token ids from {ids.min()} to {ids.max()}, but the model knows those "
                f"from 0 to {vocabulary - 1}: use this model's own tokenizer"
            )
        return ids.astype(np.int64)

    def read_prefix(self, given: TextOrIds | None) -> Tokens:
        """Token ids, `[tokens]`, of what stands before every document.

        A text gets in front what the tokenizer itself puts before a prompt, once. `None` is that
        alone, or else the BOS token of tokenizer or model, or else nothing.

        Raises:
            SettingError: As in `read`, or it fills the model.
        """
        if given is None:
            ids = self.read(self._lead() or self._bos(), "the BOS token")
        else:
            ids = self.read(given, "prefix")
            lead = self._lead() if isinstance(given, str) else []
            if ids[: len(lead)].tolist() != lead:  # the text may have it spelled out
                ids = np.concatenate([np.array(lead, dtype=np.int64), ids])
        if len(ids) >= self.longest:
            raise SettingError(
                f"prefix has {len(ids):,} tokens, which leaves no room for documents: the model "
                f"has {self.longest:,} positions"
            )
        return ids

    def _tokenize(self, text: str, name: str) -> list[int]:
        if self._tokenizer is None:
            raise SettingError(f"{name} is a text: pass tokenizer=..., or pass its token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SettingError(
                f"{name} is no text that UTF-8 can express ({error.reason}, character "
                f"{error.start}): fix it or leave it out"
            ) from None
        return self._ids(text, special=False)

    def _ids(self, text: str, special: bool) -> list[int]:
        assert self._tokenizer is not None
        ids: Any = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return list(ids)

    def _lead(self) -> list[int]:
        """What the tokenizer puts before each prompt."""
        if self._tokenizer is None:
            return []
        bare, full = self._ids("a", special=False), self._ids("a", special=True)
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return full[:at]
        return []

    def _bos(self) -> list[int]:
        for source in (self._tokenizer, self._text_config):
            bos = getattr(source, "bos_token_id", None)
            if isinstance(bos, int):
                return [bos]
        return []
