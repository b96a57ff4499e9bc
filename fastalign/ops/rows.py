"""The row kernels' contract, and its plain PyTorch version.

A *tile* holds head outputs `u = hidden @ weight.T` for n rows (tokens) and a slab of v vocabulary columns that starts
at `v0`: shape (n, v), float32, any strides (CPU tiles are vocabulary-major: the transpose of a contiguous (v, n)
buffer). A backend supplies these functions on tiles, and nothing else:

    row_stats(tile, bias, targets, v0, state, spec)             folds the tile into the running `RowState`
    row_grad(tile, bias, targets, v0, stats, coef, spec, out)   writes ∂L/∂u of the tile to `out`, which may be the tile
    row_exp(tile, bias, stats, spec, out)                       writes exp(z − max) in 16 bits, for the cached schedule
    row_loss_grad(tile, bias, targets, state, known, spec, out)     statistics and gradient of a tile that spans the
        vocabulary, where ∂L/∂logps (and ∂L/∂entropy) of each row is known before its log-prob is: cross-entropy and
        SFT, REINFORCE. One call instead of row_stats, finish, coefficients and row_grad: same results up to the order
        of sums, and where a backend can hold a row the logits are read once. `known_grads` has `known`'s type
        and makes this function of the others

With `rows` (m,) int64, ascending, row_grad works on those rows of the tile: targets, stats, coef and out are of m rows,
and out may be tile[:m]. That is how rows that contribute nothing leave a tile that holds them (`live_rows`).
With `spec.exp_tile` row_grad gets such a 16-bit tile of exponentials E instead of u: p = E·exp(−log_sum). The bias is
in them; that mode has no softcap and no entropy coefficient. Tiles are float32; float64 inputs (gradient checks) make
them float64, here only.

With b = bias[v0:v0+v] (or 0), the logits are

    z = out_scale · tanh(in_scale · (u + b))   with a softcap,      z = in_scale · (u + b)   without one.

Everything per row that does not need the vocabulary (log-probs, entropy, gradient coefficients) is computed here, once,
for all backends, on vectors of length n. The formulas stand in the docstrings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.ops.tile_sizes import align

# Rows of RowState.values
MAX, SUM, TARGET, ENT, SUM_SQ, SUM_Z = range(6)


@dataclass(frozen=True, slots=True)
class RowSpec:
    """What is computed per row, in numbers a kernel can take as compile-time flags."""

    in_scale: float = 1.0  # logit_scale / temperature; with a softcap logit_scale / softcap
    out_scale: float = 1.0  # softcap / temperature; unused without a softcap
    softcap: bool = False
    entropy: bool = False
    top1: bool = False
    sum_sq: bool = False
    sum_z: bool = False
    exp_tile: bool = False

    @classmethod
    def make(
        cls, *, temperature: float, logit_scale: float, softcap: float | None, entropy: bool = False, top1: bool =
        False,
        sum_sq: bool = False, sum_z: bool = False,
    ) -> RowSpec:  # fmt: skip
        flags = {"entropy": entropy, "top1": top1, "sum_sq": sum_sq, "sum_z": sum_z}
        if softcap is None:
            return cls(in_scale=logit_scale / temperature, **flags)
        return cls(in_scale=logit_scale / softcap, out_scale=softcap / temperature, softcap=True, **flags)


class RowState(NamedTuple):
    """Running sums over vocabulary slabs; slabs must be folded in ascending order of v0.

    values: (6, n) float32, contiguous. With m = max so far:
        MAX     m = max_v z_v                                  starts at -inf
        SUM     Σ_v exp(z_v − m)                               starts at 0
        TARGET  z_y, once the slab that holds y was folded     starts at NaN, and stays so if there is no such slab
        ENT     Σ_v exp(z_v − m)·(z_v − m)                     only with spec.entropy
        SUM_SQ  Σ_v exp(2(z_v − m))                            only with spec.sum_sq
        SUM_Z   Σ_v z_v                                        only with spec.sum_z
    argmax: (n,) int64, the first index v at which z_v = m     only with spec.top1 (else shape (0,))
    """

    values: Tensor
    argmax: Tensor

    @classmethod
    def start(cls, n: int, spec: RowSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> RowState:
        values = torch.zeros(6, n, dtype=dtype, device=device)
        values[MAX].fill_(-torch.inf)
        values[TARGET].fill_(torch.nan)
        return cls(values, torch.zeros(n if spec.top1 else 0, dtype=torch.int64, device=device))


class RowStats(NamedTuple):
    """Finished rows, each (n,) float32. lse = max + log_sum; the two stay apart because their sum rounds."""

    max: Tensor
    log_sum: Tensor
    target: Tensor  # z_y
    logps: Tensor  # (z_y − max) − log_sum, never above 0
    entropy: Tensor | None

    @property
    def lse(self) -> Tensor:
        return self.max + self.log_sum


class RowCoef(NamedTuple):
    """Per-row numbers, each (n,) float32, that turn a tile into its gradient; `entropy` is None when it gets none.

        G_v = p_v·(base − entropy·(z_v − lse))   for v ≠ y,      G_y = target,      ∂L/∂u = G · dz/du

    With a, c, e the gradients of logps, lse and entropy:
        base = c − a − e·H,   entropy = e,   target = −a·expm1(logps) + p_y·(c − e·(logps + H))
    p_y − 1 is taken as expm1(logps) in float32, before anything is rounded.
    """

    base: Tensor
    target: Tensor
    entropy: Tensor | None


def finish(state: RowState, spec: RowSpec) -> RowStats:
    values = state.values
    log_sum = values[SUM].log()
    entropy = log_sum - values[ENT] / values[SUM] if spec.entropy else None
    return RowStats(values[MAX], log_sum, values[TARGET], (values[TARGET] - values[MAX]) - log_sum, entropy)


def log_sum_sq_probs(state: RowState, stats: RowStats, spec: RowSpec) -> Tensor | None:
    """log Σ_v p_v² of finished rows, (n,) float32; None where spec.sum_sq did not ask for it."""
    return state.values[SUM_SQ].log() - 2 * stats.log_sum if spec.sum_sq else None


def coefficients(
    stats: RowStats, grad_logps: Tensor | None, grad_lse: Tensor | None, grad_entropy: Tensor | None
) -> RowCoef:
    zero = torch.zeros_like(stats.logps)
    a = zero if grad_logps is None else grad_logps
    c = zero if grad_lse is None else grad_lse
    p_target = stats.logps.exp()
    base = c - a
    target = -a * torch.expm1(stats.logps) + p_target * c
    if grad_entropy is not None:
        assert stats.entropy is not None
        base = base - grad_entropy * stats.entropy
        target = target - grad_entropy * p_target * (stats.logps + stats.entropy)
    return RowCoef(base, target, grad_entropy)


def tile_logits(tile: Tensor, bias: Tensor | None, spec: RowSpec) -> Tensor:
    """z of a tile, as a new tensor."""
    z = tile if bias is None else tile + bias.to(tile.dtype)
    return (z * spec.in_scale).tanh_().mul_(spec.out_scale) if spec.softcap else z * spec.in_scale


def row_stats(tile: Tensor, bias: Tensor | None, targets: Tensor, v0: int, state: RowState, spec: RowSpec) -> None:
    """Fold one tile into `state`, in place. tile (n, v) float32; bias (v,) or None; targets (n,) int64."""
    z = tile_logits(tile, bias, spec)
    values = state.values
    slab_max, slab_argmax = z.max(dim=1)
    if spec.top1:
        slab_argmax = (z == slab_max[:, None]).int().argmax(dim=1)  # the first one: max() promises no order among ties
        state.argmax.copy_(torch.where(slab_max > values[MAX], slab_argmax + v0, state.argmax))
    if spec.sum_z:
        values[SUM_Z] += z.sum(dim=1)
    local = targets - v0
    inside = (local >= 0) & (local < tile.shape[1])
    picked = z.gather(1, local.clamp(0, tile.shape[1] - 1)[:, None])[:, 0]
    values[TARGET].copy_(torch.where(inside, picked, values[TARGET]))

    new_max = torch.maximum(values[MAX], slab_max)
    center = torch.where(new_max == -torch.inf, 0.0, new_max)  # all logits −inf so far: exp(−inf − 0) = 0
    delta = values[MAX] - center
    scale = delta.exp()  # exp(-inf) = 0 at the first slab
    z -= center[:, None]
    e = z.exp()
    if spec.entropy:
        carried = torch.where(values[SUM] > 0, (values[ENT] + delta * values[SUM]) * scale, 0.0)
        values[ENT].copy_(carried + torch.where(e > 0, e * z, 0.0).sum(dim=1))
    values[SUM].copy_(values[SUM] * scale + e.sum(dim=1))
    if spec.sum_sq:
        values[SUM_SQ].copy_(values[SUM_SQ] * scale * scale + e.square_().sum(dim=1))
    values[MAX].copy_(new_max)


def row_grad(
    tile: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    v0: int,
    stats: RowStats,
    coef: RowCoef,
    spec: RowSpec,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Write ∂L/∂u of one tile to `out`: (n, v), float32 or a 16-bit dtype, any strides; it may be the tile itself."""
    tile = tile if rows is None else tile.index_select(0, rows)
    slope: Tensor | float = spec.in_scale
    if spec.exp_tile:
        assert not spec.softcap
        assert coef.entropy is None
        grad = tile.float() * (torch.exp(-stats.log_sum) * coef.base)[:, None]
    else:
        z = tile_logits(tile, bias, spec)
        if spec.softcap:
            slope = (1 - (z / spec.out_scale).square_()).mul_(spec.in_scale * spec.out_scale)
        logp = z.sub_(stats.max[:, None]).sub_(stats.log_sum[:, None])
        grad = logp.exp()
        if coef.entropy is None:
            grad *= coef.base[:, None]
        else:
            grad = torch.where(grad > 0, grad * (coef.base[:, None] - coef.entropy[:, None] * logp), grad)
    local = targets - v0
    inside = (local >= 0) & (local < tile.shape[1])
    local = local.clamp(0, tile.shape[1] - 1)[:, None]
    grad.scatter_(1, local, torch.where(inside[:, None], coef.target[:, None], grad.gather(1, local)))
    out.copy_(grad.mul_(slope))


def row_exp(tile: Tensor, bias: Tensor | None, stats: RowStats, spec: RowSpec, out: Tensor) -> None:
    """Write exp(z − max) of one tile to `out` (n, v), a 16-bit dtype, any strides."""
    out.copy_(tile_logits(tile, bias, spec).sub_(stats.max[:, None]).exp_())


def with_exponentials(spec: RowSpec) -> RowSpec:
    return replace(spec, exp_tile=True)


def rescale(coef: RowCoef) -> tuple[RowCoef, Tensor]:
    """Coefficients times 2^k with the largest near 1, and 2^−k (0-dim float32, on the device).

    Keeps float16 gradient tiles away from its underflow (6e-8) and overflow; powers of two round nothing.
    """
    up, down = powers_of_two(torch.maximum(coef.base.abs().amax(), coef.target.abs().amax()))
    entropy = None if coef.entropy is None else coef.entropy * up
    return RowCoef(coef.base * up, coef.target * up, entropy), down


def powers_of_two(largest: Tensor) -> tuple[Tensor, Tensor]:
    """2^k that takes `largest` (0-dim) into [½, 1), and 2^−k; 1 and 1 where it is 0."""
    exponent = torch.where(largest > 0, -torch.frexp(largest).exponent, 0)
    one = torch.ones_like(largest)
    return torch.ldexp(one, exponent), torch.ldexp(one, -exponent)


def live_rows(coef: RowCoef) -> Tensor | None:
    """Rows with a coefficient that is not 0, (m,) int64 ascending, where the host knows them and leaving out the others
    shortens the GEMMs; None: take all rows. A NaN is not 0.

    The others contribute exactly 0 to every gradient: PPO's clipped tokens, and those without an advantage, KL or
    entropy term. An accelerator's coefficients are not asked for: that would wait for them.
    """
    if coef.base.device.type != "cpu":
        return None
    live = (coef.base != 0) | (coef.target != 0)
    if coef.entropy is not None:
        live |= coef.entropy != 0
    rows = live.nonzero()[:, 0]
    return rows if align(len(rows)) < align(len(live)) else None


def take(stats: RowStats, coef: RowCoef, rows: Tensor) -> tuple[RowStats, RowCoef]:
    """The given rows of both."""
    return (
        RowStats(*(None if t is None else t.index_select(0, rows) for t in stats)),  # type: ignore[arg-type]
        RowCoef(*(None if t is None else t.index_select(0, rows) for t in coef)),  # type: ignore[arg-type]
    )


def join(states: list[RowState]) -> RowState:
    """Rows of several states, one after the other."""
    return RowState(torch.cat([s.values for s in states], dim=1), torch.cat([s.argmax for s in states]))


def cut(stats: RowStats, coef: RowCoef, start: int, stop: int) -> tuple[RowStats, RowCoef]:
    """Rows start:stop of both."""
    part = slice(start, stop)
    return (
        RowStats(*(None if t is None else t[part] for t in stats)),  # type: ignore[arg-type]
        RowCoef(*(None if t is None else t[part] for t in coef)),  # type: ignore[arg-type]
    )
