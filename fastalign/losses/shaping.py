"""From a score per completion to a reward per token: normalisation, clipping, and the KL to the reference.

Everything here is without gradient, and nothing waits for the device except `RunningMoments.state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastalign.losses.masking import masked
from fastalign.losses.policy import KL_ESTIMATORS, kl_estimate


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    *,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
) -> tuple[Tensor, Tensor]:
    """Rewards whose sum over a completion is its score minus kl_coef times its KL to the reference (arXiv 1909.08593).

        r_t = −kl_coef·KL_t, plus the completion's score at its last token

    Only with k1 is the policy gradient of these rewards that of the objective E[score] − kl_coef·KL(π‖π_ref). Rewards
    are constants to it, so E[∇KL_t] is lost, which is 0 for k1 alone: k3 is left with ∇KL(π‖π_ref) − ∇KL(π_ref‖π), and
    near the reference the pull of k2 and of k3 grows with the square of the log-ratio, not with the log-ratio. On a
    task whose optimum is known both end below the reference that they started from. In the *loss* k2 is the right one.

    Args:
        scores: (B,) float, one per completion.
        logps, ref_logps: (B, T) float, log-probs in nats of the sampled tokens under the policy that sampled them and
            under the reference; ref_logps may be None with kl_coef=0, the KL is then 0.
        mask: (B, T) bool, True where a token was sampled. The last one of a row is found here, never by an id; what
            lies outside, NaN included, never enters, nor does the score of a row without a token.
        kl_coef: at least 0; a float, or a 0-dim tensor on the device.
        kl_estimator: "k1", "k2" or "k3", see `kl_estimate`.

    Returns:
        (rewards, kl), both (B, T) and 0 outside the mask; float64 if scores or logps are, else float32. kl is not
        multiplied by kl_coef.

    Raises:
        ValueError: shapes or devices that differ, kl_coef < 0 or not finite, an unknown estimator, no reference.
    """
    if logps.dim() != 2:
        raise ValueError(f"logps: shape {tuple(logps.shape)}, accepted is (B, T)")
    _check_scores(scores, logps.shape[0], logps.device)
    if isinstance(kl_coef, Tensor):
        if kl_coef.dim() or kl_coef.device not in (logps.device, torch.device("cpu")):
            raise ValueError(
                f"kl_coef: shape {tuple(kl_coef.shape)} on {kl_coef.device}, accepted are a float and a 0-dim tensor "
                f"on {logps.device}"
            )
    elif not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef={kl_coef}: it must be at least 0 and finite")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={kl_estimator!r}: accepted are {', '.join(map(repr, KL_ESTIMATORS))}")
    if ref_logps is None and (isinstance(kl_coef, Tensor) or kl_coef):
        raise ValueError(f"kl_coef={kl_coef} needs ref_logps, the reference's log-probs of the same tokens")

    dtype = torch.promote_types(torch.promote_types(scores.dtype, logps.dtype), torch.float32)
    given, mask = masked(logps.to(dtype), {"ref_logps": None if ref_logps is None else ref_logps.detach()}, mask)
    kl = torch.zeros_like(given["logps"])
    if ref_logps is not None:
        kl = kl_estimate(given["logps"], given["ref_logps"], kl_estimator)
    shaped = isinstance(kl_coef, Tensor) or kl_coef > 0  # 0 times an infinite KL would be NaN
    rewards = kl * -kl_coef if shaped else torch.zeros_like(kl)
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(is_last, rewards + scores[:, None].to(dtype), rewards), kl


@torch.no_grad()
def shape_scores(
    scores: Tensor,
    *,
    moments: RunningMoments | None = None,
    shift_mean: bool = True,
    clip: float | None = None,
    finished: Tensor | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """What the policy is trained on instead of raw scores, in this order; each step is left out when not asked for.

        normalise   (score − mean)/std with the running `moments`; shift_mean=False divides by std alone
        clip        to [−clip, clip]
        penalise    minus `missing_eos_penalty` where a completion did not finish: after the clip, which would swallow
                    it, and outside the moments, so that its unit is that of the rewards the policy sees

    Args:
        scores: (B,) float. Call `moments.update(scores)` first: a score belongs to the statistics that normalise it.
        finished: (B,) bool, True where a completion ended by itself; needed by missing_eos_penalty.

    Returns:
        (B,), float64 if scores are, else float32.

    Raises:
        ValueError: shapes that differ, clip or missing_eos_penalty not positive and finite, a penalty without finished.
    """
    _check_scores(scores)
    for name, value in (("clip", clip), ("missing_eos_penalty", missing_eos_penalty)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: it must be positive and finite; None leaves it out")
    if missing_eos_penalty is not None and finished is None:
        raise ValueError(f"missing_eos_penalty={missing_eos_penalty} needs finished: which completions ended")
    if finished is not None and (
        finished.shape != scores.shape or finished.dtype != torch.bool or finished.device != scores.device
    ):
        raise ValueError(
            f"finished: {finished.dtype} {tuple(finished.shape)}, accepted is bool {tuple(scores.shape)}, as scores, "
            f"on {scores.device}; it is on {finished.device}"
        )
    shaped = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if moments is not None:
        shaped = moments.normalize(shaped, shift_mean=shift_mean)
    if clip is not None:
        shaped = shaped.clamp(-clip, clip)
    if missing_eos_penalty is not None:
        assert finished is not None
        shaped = torch.where(finished, shaped, shaped - missing_eos_penalty)
    return shaped


@torch.no_grad()
def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft punishment of length (arXiv 2503.14476 eq. 13), as a share of the full one.

        clip((|y| − (max_length − buffer)) / buffer, 0, 1)

    lengths: (B,) tokens of each completion. buffer: the last tokens before max_length, over which it rises.
    Returns (B,) float32 in [0, 1]. Raises ValueError for a buffer outside [1, max_length].
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer={buffer}: it must be positive and at most max_length={max_length}")
    return ((lengths.to(torch.float32) - (max_length - buffer)) / buffer).clamp(0, 1)


class RunningMoments:
    """Mean and variance of every score ever seen, as if all were at hand at once, however they came in batches.

    Batches are merged in float64 by the update of Chan, Golub and LeVeque (1979), which never subtracts two large sums:

        δ = mean_b − mean,   mean ← mean + δ·n_b/(n + n_b),   M2 ← M2 + M2_b + δ²·n·n_b/(n + n_b)

    The state lies on the device of the scores. A score that is not finite makes it not finite for good.
    """

    _NAMES = ("count", "mean", "sum_of_squares")

    def __init__(self) -> None:
        self._state = torch.zeros(3, dtype=torch.float64)  # n, mean, M2

    @property
    def count(self) -> Tensor:
        """How many scores were seen, 0-dim float64."""
        return self._state[0]

    @property
    def mean(self) -> Tensor:
        """0-dim float64; 0 before the first score."""
        return self._state[1]

    @property
    def variance(self) -> Tensor:
        """Bessel-corrected, 0-dim float64; 0 before the second score."""
        return self._state[2] / (self.count - 1).clamp(min=1)

    @torch.no_grad()
    def update(self, scores: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take in a batch of scores, any shape and number, none included; no host sync.

        reduce: sums a tensor over processes; all of them call it, and all end with the moments of all scores.
        """
        if not scores.is_floating_point():
            raise ValueError(f"scores: dtype {scores.dtype}, accepted are floating-point scores")
        total = reduce or (lambda tensor: tensor)
        wide = scores.double()
        sums = total(torch.stack([wide.sum(), wide.new_full((), wide.numel())]))
        mean_b, n_b = sums[0] / sums[1].clamp(min=1), sums[1]
        squares_b = total((wide - mean_b).square().sum())
        n, mean, squares = self._state.to(wide.device, non_blocking=True).unbind()
        share, delta = n_b / (n + n_b).clamp(min=1), mean_b - mean
        self._state = torch.stack([n + n_b, mean + delta * share, squares + squares_b + delta.square() * n * share])

    @torch.no_grad()
    def normalize(self, scores: Tensor, *, shift_mean: bool = True) -> Tensor:
        """(scores − mean)/std, or scores/std, in the scores' dtype. Scores that never differed are not scaled."""
        state = self._state.to(scores.device, non_blocking=True)
        mean, variance = state[1], state[2] / (state[0] - 1).clamp(min=1)
        noise = (torch.finfo(torch.float32).eps * mean).square()  # scores come in float32 at best
        std = torch.where(variance > noise, variance.sqrt(), 1.0)
        wide = scores.double()
        return ((wide - mean if shift_mean else wide) / std).to(scores.dtype)

    def state_dict(self) -> dict[str, float]:
        """JSON-able; restores to the bit. Waits for the device: for checkpoints."""
        return dict(zip(self._NAMES, self._state.tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises ValueError for anything else."""
        if set(state) != set(self._NAMES):
            raise ValueError(f"state has {sorted(state)}, accepted are {', '.join(self._NAMES)}")
        values = [float(state[name]) for name in self._NAMES]
        if not all(map(math.isfinite, values)) or values[0] < 0 or values[2] < 0:
            raise ValueError(f"state {dict(state)}: values must be finite, count and sum_of_squares at least 0")
        self._state = torch.tensor(values, dtype=torch.float64)


def _check_scores(scores: Tensor, count: int | None = None, device: torch.device | None = None) -> None:
    accepted = "(B,)" if count is None else f"({count},), one per completion"
    if scores.dim() != 1 or (count is not None and len(scores) != count):
        raise ValueError(f"scores: shape {tuple(scores.shape)}, accepted is {accepted}")
    if not scores.is_floating_point():
        raise ValueError(f"scores: dtype {scores.dtype}, accepted are floating-point scores")
    if device is not None and scores.device != device:
        raise ValueError(f"scores are on {scores.device}, accepted is the device of logps, {device}")
