"""Models whose parameters FSDP2 shards over processes: a head whose weight is whole, and all weights whole for a while.

FSDP2 puts a module's parameters in place when that module is called, and takes them away afterwards. A fused forward
reads the weight of a head that it never calls: where the head is a unit of its own it is called here, so that FSDP2
sees it. Work that differs from process to process (sampling, scoring) would wait for the others in every such exchange:
`whole_weights` gathers once for all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

Result = TypeVar("Result")


def sharded_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are sharded (DTensors, as FSDP2 and tensor parallelism make them)."""
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages the model, or the modules in it; their weights may be whole at the moment."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 manages the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def call_within(modules: Iterable[nn.Module], fn: Callable[[Tensor], Result], hidden: Tensor) -> Result:
    """fn(hidden), inside the calls of those of `modules` that FSDP2 or ZeRO-3 shards by themselves: their weights are
    whole there, and their gradients are reduced like all others. modules: from outside to inside."""
    for module in reversed(list(dict.fromkeys(modules))):
        if isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            fn = functools.partial(_call_as, module, fn)
    return fn(hidden)


def _call_as(module: nn.Module, fn: Callable[[Tensor], Result], hidden: Tensor) -> Result:
    """The module called with another forward."""
    own = module.__dict__.get("forward")
    module.forward = fn
    try:
        result: Result = module(hidden)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    return result


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter that FSDP2 shards is whole in every process, and forwards exchange nothing.

    model: what was sharded as a whole, in all processes at once; any module in it may be called inside, any number of
    times, without gradients. A model that is not sharded is left alone. The whole model is in memory meanwhile.
    """
    if is_partitioned(model):
        raise ValueError(
            f"{type(model).__name__} is partitioned by DeepSpeed ZeRO-3, where it cannot score or sample in processes "
            "that have different amounts of work: run with fsdp (FSDP2)"
        )
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield
        return
    if units[0] is not model:
        raise ValueError(f"{type(model).__name__} is not what FSDP2 was applied to as a whole: a part of it was")
    root: Any = model
    root._get_fsdp_state()._lazy_init()  # else the unit that is called first takes itself for the root
    groups = [group for unit in units for group in _groups(unit)]
    resharding = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info = None  # what a forward finds whole, it leaves whole
        for unit in units:
            unit.unshard()
        yield
    finally:
        for group, mesh_info in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = mesh_info
        for unit in units:
            unit.reshard()


def reshard(model: nn.Module) -> None:
    """Take back what a forward without a backward has left whole: FSDP2 keeps the root's weights for the backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _groups(unit: FSDPModule) -> list[Any]:
    state: Any = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # one, in older versions of torch
    return [group for group in (groups if groups is not None else [state._fsdp_param_group]) if group is not None]


def set_gradient_sync(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces the gradients of a model that FSDP2 shards over processes, or adds them up."""
    root: Any = model
    root.set_requires_gradient_sync(wanted)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, a collective; any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
