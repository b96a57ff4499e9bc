"""What a PPO run should be told of while it runs: each with its number, and not at every step."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# How far the mean ratio of the first mini-batch may be from 1, which it is but for rounding.
_RATIO_TOLERANCE = {True: 2e-2, False: 1e-3}  # 16-bit computation, or not
_EXPLODING = 5.0  # times the target
_LARGE_KL = 50.0  # nats per completion, without a target


def phase_warnings(
    values: Mapping[str, float], *, target_kl: float | None, narrow: bool, completions: int
) -> list[str]:
    """What is wrong in the metrics of the phases since the last log line, if anything.

    target_kl: nats per completion that a controller aims at, or None. narrow: computed in 16 bits. completions: of a
    phase, over all processes.
    """
    found = []
    kl, kl_k3 = values.get("objective/kl"), values.get("objective/kl_k3")
    if kl_k3 is not None and kl_k3 < -1e-4:
        found.append(
            f"objective/kl_k3 is {kl_k3:.3g}: the k3 estimate of a KL cannot be negative; log-probs of policy or "
            "reference are wrong"
        )
    if kl is not None and kl_k3 is not None and kl < -1.0 and kl < -2 * abs(kl_k3):
        found.append(
            f"objective/kl is {kl:.3g} nats per completion: a KL is not negative, so completions are not the policy's "
            "own samples (sampling options other than temperature, or another tokenizer), or there are too few of them"
        )
    limit = _LARGE_KL if target_kl is None else _EXPLODING * target_kl
    if kl is not None and kl > limit:
        aim = "no target" if target_kl is None else f"a target of {target_kl:g}"
        found.append(
            f"objective/kl is {kl:.3g} nats per completion, with {aim}: the policy has left the reference; raise "
            "kl_coef, or lower learning_rate"
        )
    ratio = values.get("val/first_ratio")
    if ratio is not None and abs(ratio - 1) > _RATIO_TOLERANCE[narrow]:
        found.append(
            f"the ratio is {ratio:.4f} at the first mini-batch of a phase, before any update, where it should be 1: "
            "the policy that is trained is not the one that was scored (dropout, other precision)"
        )
    clipped = values.get("completions/clipped_ratio")
    if clipped is not None and clipped == 1.0 and completions > 1:
        found.append(
            f"all {completions} completions of a phase ran into response_length without a stop token: check the stop "
            "tokens, or raise response_length"
        )
    return found


class Warner:
    """Logs each kind of warning when it first appears, and again only after it was gone."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, warnings: list[str], step: int) -> None:
        kinds = {_kind(text) for text in warnings}
        for text in warnings:
            if _kind(text) not in self._said:
                logger.warning("step %d: %s", step, text)
        self._said = kinds


def _kind(text: str) -> str:
    """A warning without its figures."""
    return text.partition(" is ")[0]
