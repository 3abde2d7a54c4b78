"""ModelIdentity: what the K/V of a token depend on besides the tokens.

Two models that differ in anything that shapes their K/V must never share a chunk, and the same
checkpoint in two processes must. So the identity is a digest of content, never of names alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from chunkcache.keys import ChunkKey
from chunkcache.model.attributes import why_random
from chunkcache.model.makeup import Lines, Makeup, configurations, digest
from chunkcache.model.outline import Outline
from chunkcache.model.ranks import Ranks
from chunkcache.model.values import settings
from chunkcache.model.weights import counts_whole, digest_adapters, digest_weights

# Raise when the meaning of stored tensors changes. Transformers' own minor version stands beside
# it, since a release may change what a layer caches (rotated or not, latent or expanded).
KV_LAYOUT = f"1+transformers-{'.'.join(transformers.__version__.split('.')[:2])}"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What stored K/V belong to.

    Attributes:
        name: The model's name on the Hub or its folder's, for people: `digest` decides.
        revision: Commit on the Hub, or `""`.
        dtype: Data type of the weights, as `"float32"`.
        digest: SHA-256 over configuration, weights, adapters, numerics and K/V layout (64 hex).
        parts: The digests that went into `digest`, by name, to tell what differs.
        world_size: Processes that share one model (tensor parallel).
        worker: This process among them.
    """

    name: str
    revision: str
    dtype: str
    digest: str
    parts: tuple[tuple[str, str], ...]
    world_size: int = 1
    worker: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        edited: Collection[str] = (),
        makeup: tuple[Lines, Lines] | None = None,
    ) -> ModelIdentity:
        """The identity of a model as it stands: weights, adapters and settings of this moment.

        Args:
            model: The model.
            edited: Tensors that changed while they were watched (see `weights.digest_weights`).
            makeup: Its attributes and code, where they were looked at already.
        """
        attributes, code = makeup or Makeup().look(model, Outline(model))
        config: Any = model.config
        revision = getattr(config, "_commit_hash", None) or ""
        parts = (
            ("layout", KV_LAYOUT),
            ("class", f"{type(model).__module__}.{type(model).__qualname__}"),
            ("config", digest_config(model)),
            ("rope", _rope(config)),  # in the configuration too; by itself, it can be told
            # Of weights that are hashed whole it could only part copies of one checkpoint.
            ("revision", "" if counts_whole(model) else revision),
            ("weights", digest_weights(model, edited)),
            ("adapters", digest_adapters(model)),
            ("numerics", numerics(model)),
            ("attributes", digest(attributes)),
            ("code", digest(code)),
            ("random", why_random(model, list(model.named_modules()))),
        )
        whole = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        ranks = Ranks.of(model)
        return cls(model_name(model), revision, dtype, whole, parts, ranks.size, ranks.rank)

    def salt(self, namespace: str, secret: str = "", codec: str = "") -> bytes:
        """The key of every chunk hash of this model, 32 bytes.

        Args:
            namespace: Each is a world of its own.
            secret: Who does not know it can compute no hash, unless it is `""`.
            codec: The codec's own part, as `Codec.world` gives it.
        """
        text = json.dumps([self.digest, namespace, self.world_size, self.worker, codec])
        key = hashlib.sha256(secret.encode()).digest()  # HMAC pads short keys: "x" would be "x\0"
        return hmac.digest(key, text.encode(), "sha256")

    def key(self, chunk_hash: str, format: str) -> ChunkKey:
        """The key of a chunk of this model, whatever the folder is called that it came from."""
        kind = dict(self.parts)["class"].rpartition(".")[2]
        name = f"{kind}-{self.digest[:8]}"
        return ChunkKey(format, name, self.world_size, self.worker, chunk_hash)


def model_name(model: nn.Module) -> str:
    """The model's name on the Hub, the last part of a local folder, or its class name."""
    config: Any = model.config
    name = getattr(config, "_name_or_path", "") or ""
    if not name:
        return type(model).__name__
    path = Path(name)
    # A folder's path says where one machine keeps it; others would miss, and it tells too much.
    if path.is_absolute() or name.startswith(".") or path.exists():
        return path.resolve().name or type(model).__name__
    return name


def digest_config(model: nn.Module) -> str:
    """SHA-256 over all settings of a model that can shape its K/V (64 hex digits)."""
    config: Any = model.config
    return hashlib.sha256(settings(config).encode()).hexdigest()


def _rope(config: Any) -> str:
    """The settings of the rotation, as text."""
    text = config.get_text_config(decoder=True)
    names = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
    return json.dumps({n: getattr(text, n, None) for n in names}, sort_keys=True, default=str)


def numerics(model: nn.Module) -> str:
    """Switches that change what the same weights compute, as text; cheap enough for each prompt."""
    config: Any = model.config
    device = next(model.parameters()).device.type
    if device == "meta":  # weights are elsewhere and come when they are needed
        device = "cpu"
    autocast = torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device))
    attention = ",".join(str(part._attn_implementation) for part in configurations(config).values())
    experts = getattr(config, "_experts_implementation", None)
    if device != "cpu" and experts == "batched_mm":
        experts = "grouped_mm"  # which generate() takes it for while it decodes
    precision = torch.get_float32_matmul_precision()
    return f"attention={attention} experts={experts} autocast={autocast} matmul={precision}"
