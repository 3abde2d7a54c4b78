"""How near a run that reuses text at any position comes to a full run: one prompt, one arm.

A full run answers greedily. Every arm is then given the same answer token by token, and at each
step its next-token distribution is compared with the full run's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from chunkcache import RedisChunkCache
from chunkcache.anywhere.probes import Probes
from chunkcache.repair import Repair, Scores, Share
from chunkcache.stores.base import ChunkStore, ReadOnly
from chunkcache.stores.memory import MemoryStore

ANSWER_TOKENS = 32
FACT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt ready for the model.

    Attributes:
        ids: `[1, tokens]` of the whole prompt.
        bare: `[1, tokens]` of the prompt without documents.
        reference: `[1, tokens]` of the expected answer.
        fact: What a right answer contains, `""` where that cannot be checked.
    """

    ids: Tensor
    bare: Tensor
    reference: Tensor
    fact: str


@dataclass(frozen=True, slots=True)
class Full:
    """The full run.

    Attributes:
        answer: `[1, answer tokens]`, greedy.
        log_probs: `[answer tokens, vocabulary]` of the next token, at each step of the answer.
        truth: Keys and values of each layer, `[1, kv_heads, tokens, head_dim]`.
        attention: `[layers, tokens]` attention of the answer to each token of the prompt.
        reference: Mean log-likelihood of the reference, in nats per token.
        right: Whether the answer contains the fact; `None` where there is none.
    """

    answer: Tensor
    log_probs: Tensor
    truth: list[tuple[Tensor, Tensor]]
    attention: Tensor
    reference: float
    right: bool | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm on one prompt.

    Attributes:
        kl: KL divergence of the arm from the full run, in nats, mean over the answer.
        top1: Share of steps whose likeliest token is the full run's.
        reference: Mean log-likelihood of the reference, in nats per token.
        right: Whether the arm's own greedy answer contains the fact; `None` where that of the full
            run does not.
        found: Tokens of the prompt that were reused, moved or recomputed.
        charged: Tokens recomputed, probes included.
        tokens: Tokens of the prompt.
    """

    kl: float
    top1: float
    reference: float
    right: bool | None
    found: int
    charged: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Oracle(Share):
    """A control that no one can have: tokens by their true error, weighted by true attention.

    Attributes:
        truth: Keys and values of each layer of a full run, `[1, kv_heads, tokens, head_dim]`.
        attention: `[layers, tokens]` attention that the prompt's end pays to each token then.
    """

    truth: Any = None
    attention: Any = None

    def score(self, situation: Any) -> Scores:
        total = torch.zeros(situation.tokens, dtype=torch.float64)
        for index, layer in enumerate(situation.layers):
            error = torch.zeros(situation.tokens, dtype=torch.float64)
            for mine, its in zip((layer.keys, layer.values), self.truth[index], strict=True):
                its = its[:1, :, : situation.tokens].double()
                gap = (mine[:1].double() - its).pow(2).sum((0, 1, 3)).sqrt()
                error += gap / its.pow(2).sum((0, 1, 3)).sqrt().mean()
            total += error * self.attention[index].double()
        return total.numpy()


@torch.no_grad()
def run_full(
    model: Any, tokenizer: Any, question: Question, store: ChunkStore | None = None
) -> Full:
    """Answer without reuse, or exactly: what prompts of a run begin with alike is in the store."""
    # Its layers hold all tokens, those of a plain cache forget what is out of a layer's window.
    cache = RedisChunkCache(model, store or ReadOnly(MemoryStore()))
    out = model.generate(
        question.ids, past_key_values=cache, max_new_tokens=ANSWER_TOKENS, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    answer = out.sequences[:, question.ids.shape[1] :]
    log_probs = torch.stack(out.logits, dim=1)[0].float().log_softmax(-1)
    held = out.sequences[:, : cache.get_seq_length()]
    probes = Probes(model, cache.layers, held, torch.ones(held.shape[1], dtype=torch.bool), 0, [])
    behind = torch.arange(question.ids.shape[1], held.shape[1])
    attention = probes.attention(behind, range(len(cache.layers)))[:, : question.ids.shape[1]]
    cache.crop(question.ids.shape[1] - held.shape[1])
    truth = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    reference = _likelihood(model, cache, log_probs[0], question.reference)
    right = _contains(tokenizer, answer, question.fact) if question.fact else None
    return Full(answer, log_probs, truth, attention, reference, right)


@torch.no_grad()
def run_arm(
    model: Any,
    tokenizer: Any,
    question: Question,
    full: Full,
    store: ChunkStore,
    repair: Repair | str,
) -> Outcome:
    """The same prompt with text reused at any position."""
    cache = RedisChunkCache(model, ReadOnly(store), reuse="anywhere", repair=repair)
    first = model(input_ids=question.ids, past_key_values=cache, logits_to_keep=1).logits
    report = cache.report
    result = _compare(model, tokenizer, question, full, cache, first[0, -1], question.ids)
    found = report.reused + report.moved + report.recomputed
    return Outcome(*result, found, report.charged, question.ids.shape[1])


@torch.no_grad()
def run_bare(model: Any, tokenizer: Any, question: Question, full: Full) -> Outcome:
    """The question without its documents: what they are worth."""
    cache = DynamicCache(config=model.config)
    first = model(input_ids=question.bare, past_key_values=cache, logits_to_keep=1).logits
    result = _compare(model, tokenizer, question, full, cache, first[0, -1], question.bare)
    return Outcome(*result, 0, 0.0, question.bare.shape[1])


def _compare(
    model: Any,
    tokenizer: Any,
    question: Question,
    full: Full,
    cache: Any,
    first: Tensor,
    ids: Tensor,
) -> tuple[float, float, float, bool | None]:
    steps = model(input_ids=full.answer[:, :-1], past_key_values=cache).logits[0]
    log_probs = torch.cat((first[None], steps)).float().log_softmax(-1)
    kl = (full.log_probs.exp() * (full.log_probs - log_probs)).sum(-1).clamp_min(0)
    top1 = (log_probs.argmax(-1) == full.log_probs.argmax(-1)).float().mean()
    cache.crop(1 - full.answer.shape[1])
    reference = _likelihood(model, cache, log_probs[0], question.reference)
    right = None
    if full.right:
        cache.crop(1 - question.reference.shape[1])
        answer = [log_probs[0].argmax()[None, None]]
        while len(answer) < FACT_TOKENS and answer[-1].item() != tokenizer.eos_token_id:
            logits = model(input_ids=answer[-1], past_key_values=cache).logits
            answer.append(logits[:, -1].argmax(-1, keepdim=True))
        right = _contains(tokenizer, torch.cat(answer, 1), question.fact)
    return float(kl.mean()), float(top1), reference, right


def _likelihood(model: Any, cache: Any, first: Tensor, reference: Tensor) -> float:
    steps = model(input_ids=reference[:, :-1], past_key_values=cache).logits[0]
    log_probs = torch.cat((first[None].float(), steps.float())).log_softmax(-1)
    return float(log_probs.gather(1, reference[0][:, None]).mean())


def _contains(tokenizer: Any, answer: Tensor, fact: str) -> bool:
    text = tokenizer.decode(answer[0, :FACT_TOKENS], skip_special_tokens=True)
    return fact.casefold() in text.casefold()
