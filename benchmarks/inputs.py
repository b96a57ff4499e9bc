"""Hidden states, a head and targets that benchmarks of the head share."""

from __future__ import annotations

import functools

import torch
from shapes import Shape
from torch import Tensor

IGNORED = -100


class Inputs:
    """Leaves of one call, and what its losses are given.

    sequences: of equal length; of pairs the chosen ones come first.
    fraction: of each sequence's tokens, its last ones, are a response; the others' targets are ignored.
    peaked: targets have p from 0.5 to 0.9999, else logits of standard deviation 0.05·√H know nothing of them.
    live: share of response tokens whose gradient PPO's clipping leaves.
    weight: of other inputs, to share.
    """

    def __init__(
        self, shape: Shape, device: str, dtype: torch.dtype, *, sequences: int = 8, fraction: float = 1.0,
        peaked: bool = False, live: float = 1.0, frozen: bool = False, weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._draw = torch.Generator(device).manual_seed(0)
        N, H, V = shape
        self.shape, self.sequences, self.live = shape, sequences, live
        self.hidden = torch.randn(N, H, device=device, dtype=dtype, generator=self._draw)
        if weight is None:
            weight = torch.empty(V, H, device=device, dtype=dtype).normal_(0, 0.05, generator=self._draw)
            weight.requires_grad_(not frozen)
        self.weight = weight
        self.targets = torch.randint(0, V, (N,), device=device, generator=self._draw)
        if peaked:
            self._peak()
        self.hidden.requires_grad_()
        length = N // sequences
        self.targets.view(sequences, length)[:, : length - round(fraction * length)] = IGNORED
        self.rows = (self.targets != IGNORED).nonzero()[:, 0].cpu()  # as collators leave them, on the host
        self.keep = self.rows.to(device)
        self.upstream = torch.randn(N, device=device, generator=self._draw)

    def _peak(self) -> None:
        """Adds to each token's state what lifts its target's logit."""
        V = self.shape.V
        p = 1 - 10 ** -torch.empty(len(self.targets), device=self.hidden.device).uniform_(0.3, 4, generator=self._draw)
        spread = self.weight.detach()[:64].float().square().sum(1).mean()  # of a logit: its variance
        gap = torch.log(torch.tensor(float(V))) + spread / 2 + torch.logit(p)
        for part in torch.arange(len(self.targets), device=self.hidden.device).split(4096):
            row = self.weight.detach()[self.targets[part]].float()
            self.hidden[part] += (row * (gap[part] / row.square().sum(1))[:, None]).to(self.hidden.dtype)

    @functools.cached_property
    def known_logps(self) -> Tensor:
        """(N,) log-probs, 0 where ignored."""
        with torch.no_grad():
            parts = zip(self.hidden.split(512), self.targets.split(512), strict=True)
            return torch.cat([log_probs(h, self.weight, t) for h, t in parts])

    @functools.cached_property
    def old_logps(self) -> Tensor:
        """(N,) of the sampling policy: ratios near 1, and far enough outside for the share that is not live."""
        noise, clipped = torch.randn(2, len(self.targets), device=self.hidden.device, generator=self._draw)
        threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(self.live)).to(clipped.device)
        outside = torch.where(clipped > threshold, -0.35 * self.advantages, 0)
        return self.known_logps + 0.03 * noise.clamp(-3, 3) + outside

    @functools.cached_property
    def advantages(self) -> Tensor:
        """(N,) one number a sequence."""
        return torch.tensor([1.0, -0.7], device=self.hidden.device)[self.sequence_of % 2]

    @property
    def sequence_of(self) -> Tensor:
        return torch.arange(self.sequences, device=self.hidden.device).repeat_interleave(self.length)

    @functools.cached_property
    def ref_logps(self) -> Tensor:
        """(S,) of the reference, near enough for the pairs' losses to have a gradient."""
        noise = torch.randn(self.sequences, device=self.hidden.device, generator=self._draw)
        return self.known_logps.view(self.sequences, -1).sum(1) + noise

    @property
    def length(self) -> int:
        return self.shape.N // self.sequences

    @property
    def padded(self) -> tuple[Tensor, Tensor]:
        """hidden (S, T, H), targets (S, T)."""
        return self.hidden.view(self.sequences, self.length, -1), self.targets.view(self.sequences, -1)

    def prepare(self, task: str) -> Inputs:
        """What the task's loss is given is there before it is called."""
        for name in {"dpo": ["ref_logps"], "ppo": ["old_logps", "advantages"]}.get(task, []):
            getattr(self, name)
        return self

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The formula, with a float32 softmax over logits of the inputs' dtype."""
    logits = (hidden @ weight.T).float()
    found = torch.log_softmax(logits, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return found * (targets != IGNORED)
