"""Weights in pieces: what `torch.distributed.fsdp.fully_shard` makes of a model's parameters.

Between forward and backward passes each process holds a part of every parameter, as a ``DTensor``;
for a pass FSDP2 puts plain whole ones in their place. So an adapted layer computes as ever, and
only what reads or writes parameters between passes has to know.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lora_lightning.errors import AdapterError
from lora_lightning.lora.module_tree import Modules

FSDP1 = (
    "FullyShardedDataParallel (FSDP1) flattens parameters, so that no layer has a weight to adapt: "
    "call inject and then torch.distributed.fsdp.fully_shard (FSDP2) instead"
)
BEFORE = (
    "do it before fully_shard. In a LightningModule build the network in __init__, or call "
    "inject(self.model, ...) with the callback's configuration in configure_model, before "
    "fully_shard"
)
ELSEWHERE = (
    "save_adapter, called by every process, writes a file; load it into a model that is not "
    "sharded, and do it there"
)


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor, or may do so: a ``DTensor``."""
    if torch.compiler.is_compiling():  # where parts are never met
        return False
    # Of a program that shards nothing the module need not be imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_packed(tensor: Tensor) -> bool:
    """Whether the tensor is made of others and not sharded: as torchao's `quantize_` makes them."""
    return is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts; every process must ask for it.

    Differentiable, as `torch.func` and factors' products need it.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor; shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, the same on every process, into a tensor that may be sharded."""
    if is_sharded(tensor) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        live: Any = tensor
        there = value.to(live.device)
        # None: each process cuts its own part out, and nothing is sent.
        value = distribute_tensor(there, live.device_mesh, live.placements, src_data_rank=None)
    tensor.copy_(value)


def is_in_pieces(module: nn.Module) -> bool:
    """Whether `fully_shard`, or a tensor-parallel plan, was applied to this very module.

    FSDP2 may have left whole parameters in it, see `reshard`.
    """
    own = module._parameters.values()
    return isinstance(module, _fsdp("FSDPModule")) or any(map(is_sharded, own))


def _fsdp(name: str) -> Any:
    """A class of `torch.distributed.fsdp`; where nobody has imported it, one without instances."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def check_whole(modules: Modules, what: str, instead: str) -> None:
    """Refuse what needs every weight as a whole.

    Raises:
        AdapterError: a module is sharded, or flattened by `FullyShardedDataParallel`.
    """
    for name, module in modules:
        if isinstance(module, _fsdp("FullyShardedDataParallel")):
            raise AdapterError(f"{what}: {FSDP1}")
        if is_in_pieces(module):
            raise AdapterError(
                f"{what} needs whole weights, and {name or type(module).__name__} is sharded (by "
                f"fully_shard, or by a tensor-parallel plan): {instead}"
            )


def reshard(modules: Modules) -> None:
    """Take the whole parameters away that FSDP2 leaves in place after a pass without gradients.

    They are copies, which would not follow a change of the parts, and lose their memory later.
    """
    for _, module in modules if _fsdp("FSDPModule") else ():
        if isinstance(module, _fsdp("FSDPModule")):
            module.reshard()


def writes(modules: Modules) -> bool:
    """Whether this process is the one that writes what all of a sharded model have gathered."""
    held = (p for _, module in modules for p in module._parameters.values() if is_sharded(p))
    first: Any = next(held, None)
    return first is None or not any(first.device_mesh.get_coordinate())
