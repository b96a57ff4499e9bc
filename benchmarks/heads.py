"""One step of the head, from hidden states to a loss and gradients, by fastalign and by its peers.

Tasks                                           GEMMs at least, where the logits are not stored
    forward  per-token log-probs, no gradient                                                 1
    logps    as forward, with a gradient from a loss that is known only afterwards            3
    sft      summed cross-entropy                                                             3
    dpo      DPO's sigmoid loss over pairs, mean                                              3
    ppo      PPO's clipped loss over tokens, mean                                             3
    frozen   as logps, with a head that needs no gradient                                     2

A provider is a function from `Inputs` to a scalar (forward: to the log-probs). What gives per-token log-probs serves
every task, with plain PyTorch behind it; other libraries' fused losses serve the one they are made for.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from inputs import IGNORED, Inputs, log_probs
from torch import Tensor

TASKS = {"forward": 1, "logps": 3, "sft": 3, "dpo": 3, "ppo": 3, "frozen": 2}
BETA, EPSILON = 0.1, 0.2


# Per-token log-probs (N,), 0 where ignored ----------------------------------------------------------------------------


def naive(i: Inputs) -> Tensor:
    return log_probs(i.hidden, i.weight, i.targets)


def spread(i: Inputs, logps: Tensor) -> Tensor:
    """(n,) of the kept rows to (N,)."""
    return torch.zeros_like(i.upstream).index_copy(0, i.keep, logps.float())


def selected(i: Inputs) -> Tensor:
    """naive on the rows that count."""
    return spread(i, log_probs(i.hidden[i.keep], i.weight, i.targets[i.keep]))


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(log_probs, dynamic=False)


def compiled(i: Inputs) -> Tensor:
    return _compiled()(i.hidden, i.weight, i.targets)


def checkpointed(i: Inputs, rows: int = 1024) -> Tensor:
    """Chunks of tokens whose logits are computed again in the backward: what one writes against the memory."""
    from torch.utils.checkpoint import checkpoint

    parts = zip(i.hidden[i.keep].split(rows), i.targets[i.keep].split(rows), strict=True)
    chunks = [checkpoint(log_probs, h, i.weight, t, use_reentrant=False) for h, t in parts]
    return spread(i, torch.cat(chunks))


def trl(i: Inputs) -> Tensor:
    from trl.trainer.utils import _ChunkedLogProbFunction

    hidden, targets = i.hidden[i.keep], i.targets[i.keep]
    return spread(i, _ChunkedLogProbFunction.apply(hidden, i.weight, None, targets, 1.0, 8192, None, 1.0, ())[0])


def cce(i: Inputs, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "torch_compile" if i.hidden.device.type == "cpu" else "cce"
    return linear_cross_entropy(i.hidden, i.weight, i.targets, reduction=reduction, impl=impl)


def verl(i: Inputs) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return spread(i, linear_cross_entropy(i.hidden[i.keep], i.weight, i.targets[i.keep], 1.0, "none")[0])


def fastalign_logps(i: Inputs, **options: Any) -> Tensor:
    from fastalign import linear_logps

    return linear_logps(i.hidden, i.weight, i.targets, rows=i.rows, **options).logps


LOGPS: dict[str, Callable[[Inputs], Tensor]] = {
    "naive": naive, "naive, rows selected": selected, "torch.compile": compiled, "checkpointed chunks": checkpointed,
    "trl": trl, "cce": lambda i: -cce(i, "none"), "verl": verl,
}  # fmt: skip
NEEDS = {"trl": "trl", "cce": "cut_cross_entropy", "verl": "verl", "liger": "liger_kernel", "quack": "quack"}


# Losses ---------------------------------------------------------------------------------------------------------------


def with_upstream(i: Inputs, logps: Tensor) -> Tensor:
    return (logps * i.upstream).sum()


def sft_loss(i: Inputs, logps: Tensor) -> Tensor:
    return -logps.sum()


def dpo_loss(i: Inputs, logps: Tensor) -> Tensor:
    chosen, rejected = (logps.view(i.sequences, -1).sum(1) - i.ref_logps).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def ppo_loss(i: Inputs, logps: Tensor) -> Tensor:
    ratio = torch.exp(logps - i.old_logps)
    gain = torch.minimum(ratio * i.advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * i.advantages)
    return -(gain * (i.targets != IGNORED)).sum() / len(i.rows)


LOSSES: dict[str, Callable[[Inputs, Tensor], Tensor]] = {
    "logps": with_upstream, "sft": sft_loss, "dpo": dpo_loss, "ppo": ppo_loss, "frozen": with_upstream,
}  # fmt: skip


def torch_sft(i: Inputs) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum")


def liger_sft(i: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum")


def quack_sft(i: Inputs) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(i.hidden, i.weight, i.targets, ignore_index=IGNORED, reduction="sum")


def liger_dpo(i: Inputs) -> Tensor:
    """Takes no log-probs of a reference: its loss is another one, its work the same."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(use_ref_model=False, compiled=i.hidden.is_cuda)(i.weight, *i.padded)[0]


def liger_ppo(i: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, targets = i.padded
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dapo", compiled=i.hidden.is_cuda, temperature=1.0
    )
    mask, advantages = (targets != IGNORED).to(torch.int64), i.advantages.view_as(targets)[:, 0]
    old = i.old_logps.view_as(targets)
    return loss(hidden, i.weight, targets.clamp(min=0), mask, advantages, old_per_token_logps=old)[0]


def fastalign_sft(i: Inputs, **options: Any) -> Tensor:
    from fastalign import linear_cross_entropy

    return linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum", rows=i.rows, **options).loss


def fastalign_dpo(i: Inputs, **options: Any) -> Tensor:
    from fastalign import linear_dpo_loss

    hidden, targets = i.padded
    given: dict[str, Any] = {"ref_logps": i.ref_logps, "beta": BETA, "rows": i.rows}
    return linear_dpo_loss(hidden, i.weight, targets, **given, **options).loss


def fastalign_ppo(i: Inputs, **options: Any) -> Tensor:
    from fastalign import linear_ppo_loss

    hidden, targets = i.padded
    return linear_ppo_loss(
        hidden, i.weight, targets, old_logps=i.old_logps.view_as(targets), advantages=i.advantages.view_as(targets),
        epsilon_low=EPSILON, epsilon_high=EPSILON, rows=i.rows, **options,
    ).loss  # fmt: skip


FUSED: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "sft": {
        "torch linear_cross_entropy": torch_sft, "liger": liger_sft, "cce": lambda i: cce(i, "sum"), "quack": quack_sft
    },
    "dpo": {"liger": liger_dpo},
    "ppo": {"liger": liger_ppo},
}  # fmt: skip
OTHER_LOSS = {("dpo", "liger")}  # results that cannot be compared
_OURS = {"sft": fastalign_sft, "dpo": fastalign_dpo, "ppo": fastalign_ppo}


def ours(task: str, **options: Any) -> Callable[[Inputs], Tensor]:
    """fastalign's, with the schedule and workspace given."""
    if task in _OURS:
        return partial(_OURS[task], **options)
    return behind(task, partial(fastalign_logps, **options))


def skips_rows() -> bool:
    """Whether rows without a gradient can be asked to be left out of a GPU's products, or not to be."""
    from fastalign import linear_ppo_loss

    return "skip_rows" in inspect.signature(linear_ppo_loss).parameters


def behind(task: str, logps: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """The task's loss of these log-probs."""
    if task == "forward":
        return torch.no_grad()(logps)
    return lambda i: LOSSES[task](i, logps(i))


def peers(task: str) -> dict[str, Callable[[Inputs], Tensor]]:
    """All that are not fastalign's, installed or not."""
    found = {name: behind(task, logps) for name, logps in LOGPS.items()}
    return found | FUSED.get(task, {})


def missing(provider: str) -> str | None:
    """The package that a peer needs and that is not here."""
    package = NEEDS.get(provider)
    return package if package and importlib.util.find_spec(package) is None else None


def group_rows(task: str, i: Inputs) -> int | None:
    """Scored rows of the largest group whose loss is known by itself, as `fastalign.ops.plan` takes them."""
    if task == "dpo":
        return 2 * len(i.rows) // i.sequences
    return 1 if task in ("sft", "ppo") else None


def planned(task: str, i: Inputs, **options: Any) -> Any:
    """fastalign's plan of `ours(task, **options)`."""
    from fastalign.ops.logps_op import plan_for
    from fastalign.ops.rows import RowSpec

    megabytes = options.get("workspace_mb")
    return plan_for(
        i.hidden, i.weight, len(i.rows), (task != "forward", task not in ("forward", "frozen"), False),
        options.get("schedule", "auto"), None if megabytes is None else int(megabytes * 2**20), RowSpec(),
        options.get("backend", "auto"), group_rows=group_rows(task, i), gathered=len(i.rows) < len(i.targets),
    )  # fmt: skip
