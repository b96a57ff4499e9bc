"""PPO on a task whose optimum is known: max E[r] − β·KL(π‖π_ref) is reached by π* ∝ π_ref·exp(r/β), with value β·log Z.

Completions have one or two tokens over a vocabulary of four, token 0 ends them; the policy is a table of logits. Every
completion is in the batch once, weighted by its probability under the policy that sampled, so nothing is random.
"""

from __future__ import annotations

import pytest
import torch

from fastalign.losses import (
    KL_ESTIMATORS,
    kl_estimate,
    ppo_loss,
    ppo_penalty_loss,
    summarize,
    token_rewards,
    value_loss,
)
from fastalign.ops import gae
from fastalign.trainers.kl_control import PenaltyController

torch.set_num_threads(1)
V, BETA = 4, 0.5


class Task:
    """tokens (13, 2), mask (13, 2): (0), then (a, b) for a in 1…3 and b in 0…3; rewards and a reference at random."""

    def __init__(self, seed=1):
        g = torch.Generator().manual_seed(seed)
        self.tokens = torch.tensor([(0, 0)] + [(a, b) for a in range(1, V) for b in range(V)])
        self.mask = torch.ones(len(self.tokens), 2, dtype=torch.bool)
        self.mask[0, 1] = False
        self.scores = 2 * torch.rand(len(self.tokens), generator=g, dtype=torch.float64) - 1
        reference = 0.5 * torch.randn(1 + V, V, generator=g, dtype=torch.float64)
        self.ref_logps = self.logps(reference)
        self.table = reference.clone().requires_grad_()  # row 0: the first token; row 1 + a: the second after a
        self.values = torch.zeros(1 + V, dtype=torch.float64, requires_grad=True)

    def logps(self, table):
        """(13, 2), NaN where there is no token."""
        logps = table.log_softmax(-1)
        first, second = self.tokens.T
        return torch.where(self.mask, torch.stack([logps[0, first], logps[1 + first, second]], 1), torch.nan)

    def states(self, table):
        """A table of one number per state as (13, 2)."""
        return torch.stack([table[0].expand(len(self.tokens)), table[1 + self.tokens[:, 0]]], 1)

    def sequence(self, logps):
        return torch.where(self.mask, logps, 0).sum(1)

    def objective(self, table):
        logps = self.sequence(self.logps(table))
        return logps.exp() @ (self.scores - BETA * (logps - self.sequence(self.ref_logps)))

    def optimum(self):
        """(π* of every completion, the objective there)."""
        unnormalised = self.sequence(self.ref_logps) + self.scores / BETA
        log_z = unnormalised.logsumexp(0)
        return (unnormalised - log_z).exp(), BETA * log_z

    @torch.no_grad()
    def exact_values(self, rewards, weights):
        """Expected rewards to come in each state, per completion."""
        rewards = torch.where(self.mask, rewards, 0)
        table = torch.zeros(1 + V, dtype=torch.float64)
        table[0] = weights @ rewards.sum(1)
        for a in range(1, V):
            after = self.tokens[:, 0] == a
            table[1 + a] = (weights * rewards[:, 1])[after].sum() / weights[after].sum()
        return self.states(table)


def train(task, *, critic="exact", lam=0.95, estimator="k1", penalty=None, iterations=300, epochs=4, lr=1.0):
    """PPO by plain gradient descent. Returns the largest fraction of clipped tokens of any update."""
    clipped = 0.0
    for _ in range(iterations):
        with torch.no_grad():
            old = task.logps(task.table)
        weights = task.sequence(old).exp()
        rewards, _ = token_rewards(task.scores, old, task.ref_logps, task.mask, kl_coef=BETA, kl_estimator=estimator)
        if critic == "exact":
            values = task.exact_values(rewards, weights)
        else:
            values = task.states(task.values.detach()) if critic == "learned" else torch.zeros_like(rewards)
        advantages, returns = gae(rewards, values, task.mask, lam=lam)
        for _ in range(epochs):
            logps = task.logps(task.table)
            arguments = logps, old, advantages, task.mask
            if penalty is None:
                out = ppo_loss(*arguments, reduction="none")
            else:
                out = ppo_penalty_loss(*arguments, penalty_coef=penalty.coef, reduction="none")
            loss, leaves = weights @ out.loss.sum(1), [task.table]
            if critic == "learned":
                found = value_loss(task.states(task.values), returns, task.mask, reduction="none")
                loss, leaves = loss + weights @ found.loss.sum(1), [task.table, task.values]
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.data -= lr * grad
            clipped = max(clipped, float(summarize(out.metrics)["clip_fraction"]))
        if penalty is not None:
            kl = task.sequence(kl_estimate(old, task.logps(task.table.detach()), "k3"))
            penalty.update(float(weights @ kl / (weights @ task.mask.double().sum(1))), len(weights))
    return clipped


def gaps(task):
    """How far the objective is from its optimum, and the farthest probability of a completion from π*."""
    best, value = task.optimum()
    with torch.no_grad():
        found = task.sequence(task.logps(task.table)).exp()
        return float(value - task.objective(task.table)), float((found - best).abs().max())


@pytest.mark.parametrize(("critic", "lam"), [("exact", 0.95), ("exact", 0.0), ("learned", 0.95), ("none", 1.0)])
def test_ppo_reaches_the_optimum(critic, lam):
    task = Task()
    assert gaps(task)[0] > 0.1  # it starts at the reference
    assert train(task, critic=critic, lam=lam) > 0.1  # and is held back by the clip
    objective, probability = gaps(task)
    assert abs(objective) < 1e-10
    assert probability < 1e-6


def test_ppo_penalty_reaches_the_optimum():
    task, penalty = Task(), PenaltyController(1.0, target=0.01)
    train(task, penalty=penalty)
    objective, probability = gaps(task)
    assert abs(objective) < 1e-10
    assert probability < 1e-6
    assert penalty.coef < 1e-6  # at the optimum no update reaches the target: halved again and again


def test_one_update_is_one_gradient_step_on_the_objective():
    """At π = π_old the gradient of the loss is −∇(E[r] − β·KL), exactly, for any λ with an exact critic."""
    task = Task()
    task.table = torch.randn(1 + V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(task.objective(task.table), task.table)
    for critic, lam in (("exact", 0.95), ("exact", 0.0), ("none", 1.0)):
        before = task.table.detach().clone()
        train(task, critic=critic, lam=lam, iterations=1, epochs=1)
        torch.testing.assert_close(task.table.detach() - before, expected)
        task.table.data.copy_(before)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_only_k1_is_the_reward_of_that_objective(estimator):
    """As the docstring of token_rewards says: with k2 or k3 in the rewards the policy ends below its reference."""
    task = Task()
    before = gaps(task)[0]
    train(task, estimator=estimator)
    assert gaps(task)[0] > 1.5 * before


@pytest.mark.parametrize("distance", [1.0, 0.01])
def test_the_pull_towards_the_reference(distance):
    """One token: REINFORCE on −KL_t gives −∇KL(π‖ref) for k1, −∇KL(π‖ref) + ∇KL(ref‖π) for k3."""
    g = torch.Generator().manual_seed(0)
    reference, direction = torch.randn(2, 6, generator=g, dtype=torch.float64)
    table = (reference + distance * direction).requires_grad_()
    p, q = table.log_softmax(-1), reference.log_softmax(-1)
    (reverse,) = torch.autograd.grad((p.exp() * (p - q)).sum(), table, retain_graph=True)
    (forward,) = torch.autograd.grad((q.exp() * (q - p)).sum(), table, retain_graph=True)
    old, mask = p.detach()[:, None], torch.ones(6, 1, dtype=torch.bool)
    pulls = {}
    for estimator in KL_ESTIMATORS:
        rewards, _ = token_rewards(
            torch.zeros(6), old, q[:, None], mask, kl_coef=torch.tensor(1.0), kl_estimator=estimator
        )
        loss = old.exp()[:, 0] @ ppo_loss(p[:, None], old, rewards, mask, reduction="none").loss[:, 0]
        (grad,) = torch.autograd.grad(loss, table, retain_graph=True)
        pulls[estimator] = grad
    torch.testing.assert_close(pulls["k1"], reverse)
    torch.testing.assert_close(pulls["k3"], reverse - forward)
    if distance < 0.1:  # the square of the log-ratio, not the log-ratio
        assert pulls["k2"].norm() < 0.02 * reverse.norm()
        assert pulls["k3"].norm() < 0.02 * reverse.norm()
