"""Checkpoints of runs that shard their model, in runs that do not, and the other way round.

A run with FSDP2 keeps weights and optimizer state whole, under the names of parameters (`pytorch_model_fsdp.bin`,
`optimizer.bin`); one without keeps the model as transformers saves it, and optimizer state by the numbers of parameters
(`optimizer.pt`). All of it is read with `weights_only=True`.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN

SHARDED_WEIGHTS = f"{FSDP_MODEL_NAME}.bin"
SHARDED_OPTIMIZER, PLAIN_OPTIMIZER = OPTIMIZER_NAME_BIN, OPTIMIZER_NAME

Names = list[list[str]]


def is_of_sharded_run(checkpoint: str | Path) -> bool:
    return (Path(checkpoint) / SHARDED_WEIGHTS).is_file()


def read_state(file: Path, *, mapped: bool = False) -> Any:
    """What `torch.save` wrote; an error where that is anything but tensors and plain values. mapped: not read, but
    mapped into memory, for what is copied from there."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def load_named_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load the whole weights that a run with FSDP2 has kept into a model that is not sharded.

    Raises ValueError where they are another model's. What does not train may be missing: of an adapter's run only the
    adapter is kept.
    """
    file = Path(checkpoint) / SHARDED_WEIGHTS
    found = model.load_state_dict(read_state(file, mapped=True), strict=False)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if wrong := sorted((trained & set(found.missing_keys)) | set(found.unexpected_keys)):
        what = "has no" if wrong[0] in found.missing_keys else "has a"
        raise ValueError(f"{file} is of another model than this run trains: it {what} {wrong[0]}")


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> Names:
    """What the model calls the parameters of each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def load_optimizer_state(checkpoint: str | Path, names: Names, *, named: bool) -> dict[str, Any]:
    """The optimizer state of a run of the other kind, by names of parameters, or else by numbers.

    names: as of `parameter_names`, of this run. Raises ValueError for a checkpoint that trained other parameters.
    """
    file = Path(checkpoint) / (PLAIN_OPTIMIZER if named else SHARDED_OPTIMIZER)
    state = read_state(file, mapped=named)  # each process takes its share of it
    own = list(chain.from_iterable(names))
    theirs = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(group) for group in names] or not (named or theirs == own):
        raise ValueError(
            f"{file} is the state of an optimizer with {len(theirs)} parameters in groups of {sizes}, this run's has "
            f"{len(own)} in groups of {[len(group) for group in names]}, or in another order"
        )
    keys: dict[Any, Any] = dict(zip(theirs, own if named else range(len(own)), strict=True))
    groups = [group | {"params": [keys[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {keys[key]: value for key, value in state["state"].items()}, "param_groups": groups}
