"""TRPO against problems whose natural gradient is known, and on a bandit whose best arm is."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from fastalign.losses import ppo_loss
from fastalign.trainers.fisher import categorical_kl
from fastalign.trainers.trpo import trpo_step

torch.set_num_threads(1)


class Quadratic:
    """Two parameters, 5 numbers; loss gᵀθ; KL from q = ½(θ − θ₀)ᵀF(θ − θ₀), by default a little below q."""

    def __init__(self, kl=torch.log1p, seed=0):
        g = torch.Generator().manual_seed(seed)
        factor = torch.randn(5, 5, generator=g, dtype=torch.float64)
        self.fisher = factor @ factor.T + torch.eye(5, dtype=torch.float64)
        self.slope, self.start = torch.randn(2, 5, generator=g, dtype=torch.float64)
        self.parameters = [self.start[:2].clone().requires_grad_(), self.start[2:].view(3, 1).clone().requires_grad_()]
        self._kl = kl

    @property
    def theta(self):
        return torch.cat([p.reshape(-1) for p in self.parameters])

    def loss(self):
        return self.slope @ self.theta

    def kl(self):
        moved = self.theta - self.start
        return self._kl(0.5 * moved @ self.fisher @ moved)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_natural_gradient_of_a_quadratic(damping):
    problem = Quadratic()
    result = trpo_step(problem.parameters, problem.loss, problem.kl, max_kl=0.01, cg_damping=damping, cg_tolerance=0)
    x = -torch.linalg.solve(problem.fisher + damping * torch.eye(5, dtype=torch.float64), problem.slope)
    step = x * (0.02 / (x @ problem.fisher @ x)).sqrt()
    torch.testing.assert_close(problem.theta - problem.start, step, rtol=1e-9, atol=1e-12)
    assert result.accepted
    assert result.step_fraction == 1
    assert result.kl == pytest.approx(math.log1p(0.01), rel=1e-9)
    assert result.improvement == pytest.approx(float(-problem.slope @ step), rel=1e-9)
    assert result.expected_improvement == pytest.approx(result.improvement, rel=1e-9)
    assert result.cg_residual < 1e-9


def test_the_step_does_not_depend_on_how_the_policy_is_parametrised():
    """θ = Mφ: natural gradients of both move the policy by the same θ; plain gradients do not."""
    moved = []
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 2 * torch.eye(5)
    problem = Quadratic()
    for change in (torch.eye(5, dtype=torch.float64), mix):
        phi = torch.linalg.solve(change, problem.start).requires_grad_()

        def kl(phi=phi, change=change):
            step = change @ phi - problem.start
            return torch.log1p(0.5 * step @ problem.fisher @ step)

        def loss(phi=phi, change=change):
            return problem.slope @ (change @ phi)

        trpo_step([phi], loss, kl, max_kl=0.01, cg_damping=0, cg_tolerance=0, cg_iterations=20)
        moved.append((change @ phi).detach() - problem.start)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-9)


def test_backtracking_by_hand():
    """KL = q + 1000q² and q = f²·0.01 on the step: 0.11 at f = 1, 0.00875 at f = ½."""
    problem = Quadratic(kl=lambda q: q + 1000 * q * q)
    result = trpo_step(problem.parameters, problem.loss, problem.kl, max_kl=0.01, cg_damping=0, cg_tolerance=0)
    assert result.accepted
    assert result.step_fraction == 0.5
    assert result.kl == pytest.approx(0.00875, rel=1e-6)
    assert result.expected_improvement == pytest.approx(result.improvement, rel=1e-9)
    problem = Quadratic(kl=lambda q: q + 1000 * q * q)
    result = trpo_step(
        problem.parameters, problem.loss, problem.kl, max_kl=0.01, cg_damping=0, cg_tolerance=0, backtrack=0.8
    )
    assert result.step_fraction == pytest.approx(0.8**3)  # 0.8²: 0.0064 + 0.0410;  0.8³: 0.0026 + 0.0069


def worse_everywhere(problem):
    return lambda: -problem.loss() + 2 * problem.loss().detach()  # the slope of −loss, the value of loss


def undefined_elsewhere(problem):
    return lambda: problem.loss() + torch.where(problem.kl() > 0, torch.nan, 0)


@pytest.mark.parametrize("surrogate", [worse_everywhere, undefined_elsewhere])
def test_a_bad_step_is_rejected_and_undone(surrogate):
    problem = Quadratic()
    result = trpo_step(problem.parameters, surrogate(problem), problem.kl, max_kl=0.01)
    assert torch.equal(problem.theta, problem.start)
    assert not result.accepted
    assert (result.kl, result.improvement, result.step_fraction) == (0, 0, 0)
    assert result.expected_improvement > 0


def test_a_step_that_leaves_the_trust_region_is_rejected_and_undone():
    problem = Quadratic(kl=lambda q: q + 1e12 * q * q)
    result = trpo_step(problem.parameters, problem.loss, problem.kl, max_kl=0.01, line_search_steps=3)
    assert torch.equal(problem.theta, problem.start)
    assert not result.accepted


def test_an_error_in_the_line_search_undoes_the_step():
    problem, calls = Quadratic(), []

    def surrogate():
        calls.append(1)
        if len(calls) == 4:  # the value before, the gradient, the first try, the second
            raise KeyboardInterrupt
        return problem.loss() if len(calls) < 3 else problem.loss() * torch.nan

    with pytest.raises(KeyboardInterrupt):
        trpo_step(problem.parameters, surrogate, problem.kl, max_kl=0.01)
    assert torch.equal(problem.theta, problem.start)


def test_no_gradient_no_step():
    problem = Quadratic()
    result = trpo_step(problem.parameters, lambda: 0 * problem.loss(), problem.kl, max_kl=0.01)
    assert not result.accepted
    assert torch.equal(problem.theta, problem.start)


class SoftmaxPolicy:
    """logits = features @ weight + bias over 4 actions, for 6 states in a (2, 3) batch of which 5 count."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.features = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
        self.weight = torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_()
        self.bias = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
        self.mask = torch.tensor([[True, True, True], [True, False, True]])
        self.old = self.logits().log_softmax(-1).detach()
        self.actions = torch.distributions.Categorical(logits=self.old).sample()
        self.advantages = torch.randn(2, 3, generator=g, dtype=torch.float64)

    @property
    def parameters(self):
        return [self.weight, self.bias]

    def logits(self, rows=slice(None)):
        return self.features[rows] @ self.weight + self.bias

    def kl(self, rows=slice(None), num_items=None):
        return categorical_kl(self.old[rows], self.logits(rows), self.mask[rows], num_items=num_items)

    def loss(self, rows=slice(None), num_items=None):
        actions = self.actions[rows][..., None]
        logps = self.logits(rows).log_softmax(-1).gather(-1, actions)[..., 0]
        old = self.old[rows].gather(-1, actions)[..., 0]
        return ppo_loss(
            logps, old, self.advantages[rows], self.mask[rows], epsilon_low=1.0, epsilon_high=math.inf,
            num_items=num_items,
        ).loss  # fmt: skip


def test_mixed_dtypes_and_frozen_parameters():
    policy = SoftmaxPolicy()
    policy.bias = policy.bias.detach().float().requires_grad_()
    policy.old = policy.logits().log_softmax(-1).detach()
    frozen = torch.ones(3)
    result = trpo_step([policy.weight, policy.bias, frozen], policy.loss, policy.kl, max_kl=0.01)
    assert result.accepted
    assert policy.bias.dtype == torch.float32
    assert torch.equal(frozen, torch.ones(3))
    assert policy.kl().item() == result.kl <= 0.01


def test_micro_batches_take_the_step_of_the_whole():
    whole, split = SoftmaxPolicy(), SoftmaxPolicy()
    split.actions = whole.actions
    a = trpo_step(whole.parameters, whole.loss, whole.kl, max_kl=0.02)
    losses = [lambda i=i: split.loss(slice(i, i + 1), 5) for i in range(2)]
    kls = [lambda i=i: split.kl(slice(i, i + 1), 5) for i in range(2)]
    b = trpo_step(split.parameters, losses, kls, max_kl=0.02)
    assert a.accepted
    assert tuple(a) == pytest.approx(tuple(b), rel=1e-6, abs=1e-10)
    for mine, other in zip(whole.parameters, split.parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


def test_processes_take_the_step_of_the_whole():
    """Two threads stand for two processes with one sequence each; only the sums they share pass between them."""
    whole, parts = SoftmaxPolicy(), [SoftmaxPolicy(), SoftmaxPolicy()]
    expected = trpo_step(whole.parameters, whole.loss, whole.kl, max_kl=0.02)
    barrier, shared, found = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def process(rank):
        def reduce(tensor):
            shared[rank] = tensor
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        mine, rows = parts[rank], slice(rank, rank + 1)
        mine.actions = whole.actions
        found[rank] = trpo_step(
            mine.parameters, lambda: mine.loss(rows, 5), lambda: mine.kl(rows, 5), max_kl=0.02, reduce=reduce
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert tuple(found[0]) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-10)
    for a, b, c in zip(whole.parameters, parts[0].parameters, parts[1].parameters, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("max_kl", [0.01, 0.1])
def test_a_bandit_reaches_its_best_arm_within_the_trust_region(max_kl):
    rewards = torch.tensor([1.0, 0.2, -0.5, 0.9, 0.0], dtype=torch.float64)
    logits = torch.tensor([-2.0, 1.0, 2.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    value, steps = -math.inf, 0
    while value < 0.999 and steps < 200:
        old = logits.detach().log_softmax(-1)
        advantages = rewards - old.exp() @ rewards
        result = trpo_step(
            [logits],
            lambda old=old, advantages=advantages: -((logits.log_softmax(-1) - old).exp() * old.exp() @ advantages),
            lambda old=old: categorical_kl(old[None], logits[None]),
            max_kl=max_kl,
            cg_damping=1e-3,
        )
        new = logits.detach().log_softmax(-1)
        assert float((old.exp() * (old - new)).sum()) <= max_kl
        assert result.accepted
        assert float(new.exp() @ rewards) > value
        value, steps = float(new.exp() @ rewards), steps + 1
    assert value >= 0.999
    assert float(logits.detach().softmax(-1)[0]) > 0.98


REFUSED = {
    "max_kl=0: it must lie between 0 and inf": {"max_kl": 0},
    "backtrack=1: it must lie between 0 and 1": {"backtrack": 1},
    "cg_iterations=0": {"cg_iterations": 0},
    "line_search_steps=0": {"line_search_steps": 0},
    "cg_damping=-1: it must be at least 0": {"cg_damping": -1},
    "parameters: none requires grad": {"parameters": []},
    r"parameters\[0\], \(2,\), is torch.bfloat16": {
        "parameters": [torch.ones(2, dtype=torch.bfloat16).requires_grad_()]
    },
    "surrogate holds no callable": {"surrogate": []},
    r"surrogate\(\) gave torch.float32 \(3,\), accepted is a 0-dim": {"surrogate": lambda: torch.zeros(3)},
    r"surrogate\(\) is nan before the step": {"surrogate": lambda: torch.tensor(math.nan)},
    r"surrogate\(\) does not depend on the parameters": {"surrogate": lambda: torch.ones(())},
    r"kl\(\) does not depend on the parameters": {"kl": lambda: torch.zeros(2, requires_grad=True).sum()},
    r"kl\(\) is 0.5 before the step, accepted is about 0": {"kl": lambda: torch.tensor(0.5)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    problem = Quadratic()
    arguments = {"parameters": problem.parameters, "surrogate": problem.loss, "kl": problem.kl, "max_kl": 0.01}
    with pytest.raises(ValueError, match=message):
        trpo_step(**arguments | REFUSED[message])
    assert torch.equal(problem.theta, problem.start)
