"""Per-token log-probs of a linear head, differentiable, without the [tokens, vocabulary] logits.

    u = hidden @ weight.T + bias
    z = softcap·tanh(logit_scale·u / softcap) / temperature          (no softcap: logit_scale·u / temperature)
    logps = z_y − logsumexp_v z_v

The public function checks and plans; the work is done by the custom ops of fastalign.ops.logps_op.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops import rows as R
from fastalign.ops.arguments import check_accumulator, check_head, needed_gradients, row_spec, workspace_bytes
from fastalign.ops.live import check_skip_rows
from fastalign.ops.logps_op import plan_for
from fastalign.ops.parallel import over_slices
from fastalign.ops.schedule import Plan, choose, default_budget
from fastalign.ops.uploads import covers, on_device
from fastalign.types import IGNORE_INDEX, LinearLogps


def linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX, entropy: bool = False,
    top1: bool = False, log_sum_sq_probs: bool = False, mean_logits: bool = False, rows: Tensor | None = None,
    backend: str = "auto", schedule: str = "auto", workspace_mb: float | None = None,
    accumulate_into: Tensor | None = None, skip_rows: str = "auto", entropy_grad: bool = True,
    group: dist.ProcessGroup | None = None,
) -> LinearLogps:  # fmt: skip
    """Log-probs of the targets under a linear head, and what else one pass over the vocabulary can give.

    Args:
        hidden: (..., H) float32, bfloat16 or float16 (float64 on backend="torch", for gradient checks).
        weight: (V, H), hidden's dtype. Under autocast both are taken in autocast's dtype, the weight slab by slab, and
            a float32 weight gets a float32 gradient that was never rounded to 16 bits.
        targets: (...) int64, hidden's leading shape. `ignore_index` marks tokens that are not scored: they cost no
            FLOP.
        bias: (V,) or None.
        temperature, logit_scale, softcap: see the formula above; softcap=None is none.
        entropy: also −Σ p log p, nats, differentiable. top1: whether the target is the first argmax.
        log_sum_sq_probs: log Σ p², no gradient. mean_logits: mean_v z_v, no gradient.
        rows: (n,) int64, flat indices of the tokens that count, known on the host (a collator has them). Without it the
            op finds them, which costs one device synchronisation where hidden is on a GPU.
        backend: "auto", "torch", "cpu" or "triton".
        schedule: "auto", or "deferred", "overlaid", "cached", "frozen", "forward": fastalign.ops.schedule. "overlaid",
            which "auto" prefers to "deferred", takes the weight gradient's memory at the forward already: with many
            calls before one backward "deferred" is leaner.
        workspace_mb: MiB of working memory beside inputs and gradients; default {"cpu": 128, "cuda": 1024}, of which
            rows kept from forward to backward take no more than a quarter of what the logits would (half, on a GPU).
        accumulate_into: float32 (V, H), contiguous, to which the backward adds the weight's gradient, in float32 and
            without a buffer of its own; autograd's gradient of weight is then None. For loops that keep
            float32 gradients (`weight.grad` of float32 weights, `main_grad`), where nothing waits for autograd's:
            hooks on the weight, such as those of DDP and FSDP, do not run. Eager only.
        skip_rows: whether a GPU's gradient GEMMs leave out rows whose upstream gradients are all 0: "always", "never",
            or "auto", by the share that earlier calls had (fastalign.ops.live). CPUs do unless "never".
        entropy_grad: False for an entropy that carries no gradient, as a metric needs none. 16-bit logits can then wait
            for the backward as exponentials, in half the memory and for less work.
        group: processes that hold the vocabulary together, in the order of their ranks: weight (V_s, H) and bias (V_s,)
            are this one's slice, of any size; hidden, targets and rows are the same in all, and so are the results and
            the gradient of hidden, which is summed over them (the loss is computed in each, and counts once). All must
            call. top1 takes a second pass over the slice.
    Returns:
        LinearLogps(logps, lse, entropy, is_top1, log_sum_sq_probs, mean_logits) of targets' shape, float32 (is_top1
        bool), 0 where ignored. Gradients flow from logps, lse and entropy to hidden, weight and bias.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an option that cannot run, a target out of range
            (CPU tensors, or FASTALIGN_CHECK_TARGETS=1; elsewhere its log-prob is NaN).

    Source: the recomputing backward is that of Cut Cross-Entropy (arXiv 2411.09009), without atomics or filtering.
    """
    hidden, weight, bias = check_head(hidden, weight, targets, bias, rows)
    spec = row_spec(temperature, logit_scale, softcap, entropy, top1, log_sum_sq_probs, mean_logits)
    if group is not None:
        score = partial(
            linear_logps, weight=weight, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
            ignore_index=ignore_index, entropy=entropy, log_sum_sq_probs=log_sum_sq_probs, mean_logits=mean_logits,
            rows=rows, backend=backend, schedule=schedule, workspace_mb=workspace_mb, accumulate_into=accumulate_into,
            skip_rows=skip_rows, entropy_grad=entropy_grad,
        )  # fmt: skip
        return over_slices(group, score, hidden, weight, bias, targets, spec=spec, rows=rows, ignore_index=ignore_index)
    shape = targets.shape
    flat_hidden, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    needs = needed_gradients(flat_hidden, weight, bias)
    check_skip_rows(skip_rows, backend, hidden)
    if accumulate_into is not None:
        check_accumulator(accumulate_into, weight, needs[1], schedule)
    every = rows is not None and covers(rows, flat_targets.shape[0]) and _in_range(flat_targets, weight)
    if rows is not None:
        rows = None if every else on_device(rows, hidden.device)
    name, kept_rows, workspace, overlay_dtype = _schedule(
        flat_hidden, weight, rows, needs, schedule, workspace_bytes(workspace_mb), spec, backend, skip_rows, every,
        accumulate_into is not None, entropy_grad,
    )  # fmt: skip
    out = torch.ops.fastalign.linear_logps(
        flat_hidden, weight, bias, flat_targets, rows, every, spec.in_scale, spec.out_scale, spec.softcap, ignore_index,
        [entropy, top1, log_sum_sq_probs, mean_logits, entropy_grad], list(needs), backend, name, kept_rows, workspace,
        skip_rows, overlay_dtype, accumulate_into,
    )  # fmt: skip
    logps, lse, ent, is_top1, log_sum_sq, mean = (
        t.view(shape) if t.numel() or not shape.numel() else None for t in out[:6]
    )
    if not shape.numel():
        ent, is_top1, log_sum_sq, mean = (
            t if wanted else None
            for t, wanted in zip(
                (ent, is_top1, log_sum_sq, mean), (entropy, top1, log_sum_sq_probs, mean_logits), strict=True
            )
        )
    assert logps is not None
    assert lse is not None
    return LinearLogps(logps, lse, ent, is_top1, log_sum_sq, mean)


def linear_logps_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, ignore_index: int = IGNORE_INDEX,
) -> LinearLogps:  # fmt: skip
    """The formula, differentiable, with the logits in memory: for tests, in whatever dtype it is given."""
    u = hidden @ weight.T + (0 if bias is None else bias)
    z = (logit_scale * u if softcap is None else softcap * torch.tanh(logit_scale * u / softcap)) / temperature
    counts = targets != ignore_index
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    logps = log_p.gather(-1, torch.where(counts, targets, 0)[..., None])[..., 0]
    outputs = (
        logps,
        z.logsumexp(-1),
        -(p * log_p).sum(-1),
        z.argmax(-1) == targets,
        p.square().sum(-1).log(),
        z.mean(-1),
    )
    return LinearLogps(*(torch.where(counts, out, torch.zeros_like(out)) for out in outputs))


def _in_range(targets: Tensor, weight: Tensor) -> bool:
    """Whether targets on the host are all scored; True for a device's, which nobody asks."""
    return targets.device.type != "cpu" or bool(((targets >= 0) & (targets < weight.shape[0])).all())


def _schedule(
    hidden: Tensor, weight: Tensor, rows: Tensor | None, needs: tuple[bool, bool, bool], schedule: str,
    workspace: int | None, spec: R.RowSpec, backend: str, skip_rows: str, every: bool, into: bool,
    entropy_grad: bool,
) -> tuple[str, int, int, torch.dtype | None]:  # fmt: skip
    """Decided where sizes are plain integers: (schedule, rows kept for the backward, budget in bytes, dtype in which an
    overlaid gradient is summed)."""
    if schedule == "streamed":
        choose(needs, None, schedule)
    if schedule == "overlaid" and torch.compiler.is_compiling():
        raise ValueError("schedule='overlaid' cannot be compiled: a graph would copy what it overwrites; take 'auto'")
    if torch.compiler.is_compiling() and schedule != "cached":
        # how much is kept depends on the row count, which must stay symbolic: compiled graphs keep nothing unless
        # asked to
        budget = default_budget(hidden.device.type) if workspace is None else workspace
        return choose(needs, None, schedule)[0], 0, budget, None
    n = hidden.shape[0] if rows is None else rows.shape[0]

    def planned(schedule: str) -> Plan:
        return plan_for(
            hidden, weight, n, needs, schedule, workspace, spec, backend, skip_rows=skip_rows, gathered=not every,
            entropy_grad=entropy_grad,
        )  # fmt: skip

    chosen = planned(schedule)
    if into and chosen.schedule == "overlaid":  # there is no new memory for the weight's gradient
        chosen = planned("deferred")
    overlay_dtype = None
    if chosen.schedule == "overlaid":
        several = chosen.n > chosen.rows
        overlay_dtype = torch.promote_types(weight.dtype, torch.float32) if several else weight.dtype
    return chosen.schedule, chosen.kept_rows, chosen.budget_bytes, overlay_dtype
