"""A tokenizer for the tiny models: one token per word, made in memory."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY


def word_tokenizer(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Words are `w4` to `w198`, each with its number as its id; all others are one token.

    `template` tells what a prompt gets besides: `<pad>` (0), `<s>` (1), `</s>` (2).
    """
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(4, VOCABULARY))]
    numbers = {name: number for number, name in enumerate(names)}
    raw = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    special = [(name, numbers[name]) for name in names[:3]]
    raw.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as `stop_strings` needs it: it asks for the text of every token."""
    alphabet = sorted(ByteLevel.alphabet())
    raw = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=alphabet[0])


def words(ids: list[int]) -> str:
    """A text of these tokens."""
    return " ".join(f"w{number}" for number in ids)
