"""What a PPO run should be told of while it runs: each with its number, and not at every step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# Root mean square of ratio − 1 at a first mini-batch, which is 0 but for rounding; 16-bit computation, or not.
_RATIO_TOLERANCE = {True: 0.1, False: 2e-3}
_EXPLODING = 5.0  # times the target
_LARGE_KL = 50.0  # nats per completion, without a target


def phase_warnings(
    values: Mapping[str, float], *, target_kl: float | None, narrow: bool, completions: int, corrected: bool = False
) -> dict[str, str]:
    """What is wrong in the metrics of a phase, by kind; empty where nothing is.

    target_kl: nats per completion that a controller aims at, or None. narrow: computed in 16 bits. completions: of the
    phase, over all processes. corrected: the sampler's difference from the trainer is, by importance weights.
    """
    found = {}
    kl, kl_k3 = values.get("objective/kl"), values.get("objective/kl_k3")
    if kl_k3 is not None and kl_k3 < -1e-4:
        found["k3"] = (
            f"objective/kl_k3 is {kl_k3:.3g}: the k3 estimate of a KL cannot be negative; log-probs of policy or "
            "reference are wrong"
        )
    # a log-ratio with mean K has a variance of about 2K: over S completions K − z·√(2K/S) ≥ −z²/2S, and z = 4 is rare
    if kl is not None and kl < -max(1.0, 8 / max(completions, 1)):
        found["negative"] = (
            f"objective/kl is {kl:.3g} nats per completion: a KL is not negative, so completions are not the policy's "
            "own samples (sampling options other than temperature, an engine with other weights)"
        )
    limit = _LARGE_KL if target_kl is None else _EXPLODING * target_kl
    if kl is not None and not kl <= limit:  # nan too
        aim = "no target" if target_kl is None else f"a target of {target_kl:g}"
        found["exploding"] = (
            f"objective/kl is {kl:.3g} nats per completion, with {aim}: the policy has left the reference; raise "
            "kl_coef, or lower learning_rate"
        )
    # not the mean ratio: that is 1 in expectation for any policy, on samples of the old one
    first = values.get("val/first_approxkl")
    if first is not None and not (off := math.sqrt(2 * max(first, 0.0))) <= _RATIO_TOLERANCE[narrow]:
        found["ratio"] = (
            f"the ratio is {off:.2g} off 1 (root mean square over tokens) at the first mini-batch of a phase, before "
            "any update: the policy that is trained is not the one that was scored (dropout, other precision)"
        )
    gap = values.get("sampling/sampling_logp_difference/mean")
    if gap is not None and not corrected and not gap <= _RATIO_TOLERANCE[narrow]:
        found["sampler"] = (
            f"the sampler's log-probs are {gap:.2g} nats a token off the trainer's: it samples from another "
            "distribution than the one that is trained (other kernels, precision or weights, top_k, top_p); "
            "sampler_correction weighs tokens for that"
        )
    if values.get("completions/clipped_ratio") == 1.0 and completions > 1:
        found["cut"] = (
            f"all {completions} completions of a phase ran into response_length without a stop token: check the stop "
            "tokens, or raise response_length"
        )
    return found


class Warner:
    """Logs each kind of warning when it first appears, and again only after it was gone."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, warnings: Mapping[str, str], step: int) -> None:
        for kind, text in warnings.items():
            if kind not in self._said:
                logger.warning("step %d: %s", step, text)
        self._said = set(warnings)
