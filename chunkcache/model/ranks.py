"""Ranks: the processes that share one model (tensor parallel), and what they must agree on.

Each rank has some of the heads, and so a part of every chunk of its own. All must leave the same
tokens to the model, since they compute together: a rank that computes less than the others would
wait for them for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that share a model.

    Attributes:
        size: How many there are.
        rank: This one's number.
        group: Their process group, `None` for a single process.
        device: Where tensors must be for the group to exchange them.
        bypass_reason: Why they cannot be handled, or `""`.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    device: str = "cpu"
    bypass_reason: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """The ranks of a model that Transformers has sharded (`tp_plan="auto"`)."""
        mesh: Any = getattr(model, "_device_mesh", None)
        if mesh is None:
            return cls()
        sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
        others = [name for name, size in sizes.items() if size > 1 and name != "tp"]
        if others or "tp" not in sizes:
            how = ", ".join(others) or "an unnamed mesh"
            return cls(
                bypass_reason=f"the model is split over processes in an unsupported way: {how}"
            )
        group = mesh.get_group("tp")
        return cls(sizes["tp"], mesh.get_local_rank("tp"), group, mesh.device_type)

    def least(self, value: int) -> int:
        """The smallest of all ranks' values. Waits for all of them."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN, group=self.group)
        return int(shared)

    def all(self, value: bool) -> bool:
        """Whether it is so for all ranks. Waits for all of them."""
        return bool(self.least(int(value)))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has: all of it, unless it is a sharded `DTensor`."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        part: Tensor = to_local()
    return part
