"""ChunkCacheLM: EleutherAI's lm-eval with a model whose known text is not computed again.

    python -m chunkcache.harness run --model chunkcache \
        --model_args pretrained=org/name,store=redis://localhost:6379/0 --tasks arc_easy

Importing this module puts it among lm-eval's models as `chunkcache`; run as a program, it is
lm-eval's own command line. Needs `pip install 'chunkcache[lm-eval]'`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from chunkcache.enable import enabled
from chunkcache.settings import Settings

CHUNK_SIZE = 32  # tokens: questions are short


@register_model("chunkcache")
class ChunkCacheLM(HFLM):  # type: ignore[misc]
    """lm-eval's `HFLM`, whose calls use `enabled(model, store, forwards=True)`.

    Log-likelihoods are those of `HFLM`. Of each call, only the logits at the end that are looked at
    are computed.

    Args:
        pretrained: As for `HFLM`, and so are other arguments.
        store: As for `RedisChunkCache`.
        more: Settings as in `Settings`, and arguments of `HFLM`.
    """

    def __init__(self, pretrained: Any, store: Any = None, **more: Any) -> None:
        names = {field.name for field in fields(Settings)}
        own = {name: value for name, value in more.items() if name in names}
        self._store, self._settings = store, {"chunk_size": CHUNK_SIZE, **own}
        self._last = 0
        super().__init__(
            pretrained, **{name: value for name, value in more.items() if name not in names}
        )

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **more: Any) -> Any:
        # Of a row that is padded on the right to the length of another, what counts ends earlier.
        sizes = [len(context) + len(answer) for _, context, answer in requests]
        padding = 0 if self.batch_size == 1 else max(sizes, default=0) - min(sizes, default=0)
        answers = (len(answer) for *_, answer in requests)
        with self._enabled(max(answers, default=0) + padding):
            return super()._loglikelihood_tokens(requests, *args, **more)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        if not self._last or attn_mask is not None or labels is not None:
            return super()._model_call(inps, attn_mask, labels)
        with (
            torch.no_grad(),
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            # Counted from the end, where lm-eval looks for them.
            return self.model(inps, logits_to_keep=min(self._last, inps.shape[1])).logits

    def generate_until(self, requests: Any, *args: Any, **more: Any) -> Any:
        """As `HFLM` does, with the cache."""
        with self._enabled(0):
            return super().generate_until(requests, *args, **more)

    @contextmanager
    def _enabled(self, last: int) -> Iterator[None]:
        self._last = last
        try:
            with enabled(self.model, self._store, forwards=True, **self._settings) as context:
                yield
                context.flush(5)
        finally:
            self._last = 0


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
