"""Passes over a phase: who is in which mini-batch, optimizer steps, warm-up, and what controllers are told."""

import numpy as np
import pytest
import torch

from fastalign.trainers.batches import computed_tokens

ADAPTIVE = {"kl_controller": "adaptive", "target_kl": 0.5, "kl_horizon": 20}
PENALTY = {"policy_loss": "penalty", "penalty_target": 0.001}


def spied(trainer, name):
    """What a method of the trainer gave, call by call."""
    found, original = [], getattr(trainer, name)

    def spy(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    setattr(trainer, name, spy)
    return found


def test_every_completion_is_in_one_mini_batch_of_a_pass(kit):
    trainer = kit.ppo(num_ppo_epochs=3, num_mini_batches=4, per_device_train_batch_size=2)
    members = trainer._members(8)
    assert [part.tolist() == sorted(part.tolist()) for part in members] == [True] * 12
    for passes in range(3):
        assert sorted(np.concatenate(members[4 * passes : 4 * passes + 4])) == list(range(8))
    assert any(not np.array_equal(a, b) for a, b in zip(members[:4], members[4:8], strict=True))
    again = [part.tolist() for part in trainer._members(8)]
    assert again == [part.tolist() for part in members]
    trainer.state.global_step = 1
    assert [part.tolist() for part in trainer._members(8)] != again  # another phase, another order
    assert [len(part) for part in trainer._members(5)] == [2, 2, 1] * 3  # the last phase of an epoch


GROUPS = {"loss_type": "grpo", "num_generations": 4, "per_device_train_batch_size": 8, "num_mini_batches": 2}


def test_a_mini_batch_has_all_completions_of_a_prompt(kit):
    trainer = kit.ppo(num_ppo_epochs=3, **GROUPS)
    assert trainer.args.drawn_together == 4
    members = trainer._members(16)
    prompts = [tuple(part.reshape(-1, 4)[:, 0] // 4) for part in members]
    for part, own in zip(members, prompts, strict=True):
        assert part.tolist() == [4 * prompt + i for prompt in own for i in range(4)]
    assert all(sorted(prompts[i] + prompts[i + 1]) == [0, 1, 2, 3] for i in (0, 2, 4))
    assert len(set(prompts)) > 2  # drawn anew for every pass
    # a filter takes single ones out, and prompts of which none is left
    kept = np.ones(16, bool)
    kept[[4, 5, 6, 7, 9]] = False
    parts = trainer._members(16, kept)
    assert len(parts) == 6
    for i in (0, 2, 4):
        assert sorted(np.concatenate(parts[i : i + 2]).tolist()) == np.flatnonzero(kept).tolist()
        assert not {p // 4 for p in parts[i].tolist()} & {p // 4 for p in parts[i + 1].tolist()}


def test_completions_can_be_drawn_singly(kit):
    """As TRL's GRPO does; and where a prompt's completions are more than a mini-batch, it is the only way."""
    trainer = kit.ppo(num_ppo_epochs=1, whole_groups=False, **GROUPS)
    halves = [part.tolist() for part in trainer._members(16)]
    assert any(len({p // 4 for p in half}) == 4 for half in halves)
    assert kit.ppo_config(**GROUPS | {"per_device_train_batch_size": 2, "num_mini_batches": 4}).drawn_together == 1


def test_a_prompt_is_computed_once_in_each_mini_batch(kit):
    """Whole groups save more than what meets by chance, and pieces keep to micro_batch_tokens for any group."""
    ratios = {}
    for whole in (True, False):
        trainer = kit.ppo(
            max_steps=1, whole_groups=whole, sampler=kit.fixed_answers(6), train=kit.prompts(8, longest=30), **GROUPS
        )
        trainer.train()
        ratios[whole] = kit.logs(trainer)[0]["sharing_ratio"]
    assert ratios[True] > 1.2 * ratios[False] > 1.2
    trainer = kit.ppo(max_steps=1, micro_batch_tokens=40, train=kit.prompts(8, longest=20), **GROUPS)
    pieces = spied(trainer, "_pieces")
    trainer.train()
    seen = [piece for own in pieces for piece, counts in own if counts]
    assert any(len(piece["lengths"]) > 1 for piece in seen)
    for piece in seen:
        assert computed_tokens(piece, "shared") <= 40 or len(piece["lengths"]) == 1


def test_an_optimizer_step_for_each_mini_batch(kit):
    trainer = kit.ppo(num_ppo_epochs=3, num_mini_batches=2, max_steps=2, lr_scheduler_type="linear")
    outputs = spied(trainer, "_mini_batch")
    steps = []
    trainer.create_optimizer_and_scheduler(2)
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args, **kwargs: (steps.append(trainer.state.global_step), step(*args, **kwargs))[1]
    phases = spied(trainer, "update_on")
    trainer.train()
    assert len(outputs) == 12
    assert steps == [0] * 6 + [1] * 6
    for phase, log, lr in zip(phases, kit.logs(trainer), (3e-3, 1.5e-3), strict=True):
        mine = outputs[:6] if phase is phases[0] else outputs[6:]
        assert float(phase.loss) == pytest.approx(np.mean([float(output.loss) for output in mine]), rel=1e-5)
        assert log["loss"] == pytest.approx(float(phase.loss), rel=1e-4)
        assert log["lr"] == pytest.approx(lr)


def test_what_is_said_of_a_phase(kit):
    trainer = kit.ppo(num_ppo_epochs=2, max_steps=1, learning_rate=0.05)
    outputs = spied(trainer, "_mini_batch")
    trainer.train()
    (log,) = kit.logs(trainer)
    ratios = [float(output.metrics["val/ratio"].value) for output in outputs]
    assert len(ratios) == 4
    assert log["val/ratio_var"] == pytest.approx(np.var(ratios, ddof=1), rel=1e-3)
    assert ratios[0] == pytest.approx(1, abs=1e-5)
    first = float(outputs[0].metrics["policy/approxkl_k3"].value)
    # log-probs before the update are of other batches, so in float32 it is no zero; logged is a quotient in float64
    assert log["val/first_approxkl"] == pytest.approx(first, rel=1e-6)
    assert first < 1e-9
    assert log["policy/approxkl_k3"] > 1e-6  # of all of them


def test_one_mini_batch_has_no_variance(kit):
    trainer = kit.ppo(num_ppo_epochs=1, num_mini_batches=1, max_steps=1)
    trainer.train()
    assert kit.logs(trainer)[0]["val/ratio_var"] == 0


def test_the_penalty_follows_the_last_pass(kit):
    """By the KL at its mini-batches, over their tokens: not by that of the whole phase."""
    trainer = kit.ppo(num_ppo_epochs=3, max_steps=1, learning_rate=0.02, **PENALTY)
    told = []
    trainer.run.penalty.update = lambda kl, episodes: told.append((kl, episodes))
    outputs = spied(trainer, "_mini_batch")
    trainer.train()
    last = [output.metrics["policy/approxkl_k3"] for output in outputs[-2:]]
    expected = sum(float(m.total) for m in last) / sum(float(m.weight) for m in last)
    assert told == [(pytest.approx(expected, rel=1e-5), 8)]
    whole = [output.metrics["policy/approxkl_k3"] for output in outputs]
    assert expected > 1.2 * sum(float(m.total) for m in whole) / sum(float(m.weight) for m in whole)


@pytest.mark.parametrize("critic", [{}, {"value_head": True}], ids=["critic", "value head"])
def test_the_warm_up_trains_the_critic_alone(kit, critic):
    """And tells no controller of a policy that does not move: the KL would be 0, and the coefficients fall."""
    trainer = kit.ppo(critic_warmup_steps=2, weight_decay=0.1, vf_coef=1.0, **ADAPTIVE, **PENALTY, **critic)
    start = kit.weights(trainer)
    coefficients, moved = [], []
    original = trainer.training_step

    def step(*args, **kwargs):
        result = original(*args, **kwargs)
        coefficients.append((trainer.run.kl.coef, trainer.run.penalty.coef))
        moved.append({n.split(".")[0] for n, p in kit.weights(trainer).items() if not torch.equal(p, start[n])})
        return result

    trainer.training_step = step
    trainer.train()
    own = "value_head" if critic else "critic"
    assert moved == [{own}, {own}, {own, "policy"}]
    assert coefficients[:2] == [(0.05, 1.0)] * 2
    assert coefficients[2][1] != 1.0
    logs = kit.logs(trainer)
    assert "policy/approxkl_avg" not in logs[0]
    assert logs[0]["loss"] == pytest.approx(logs[0]["loss/value_avg"], rel=0.05)  # by mini-batches; by tokens
    assert logs[2]["policy/approxkl_avg"] != 0


def test_the_kl_controller_is_told_of_every_phase(kit):
    trainer = kit.ppo(max_steps=3, learning_rate=0.05, **ADAPTIVE)
    told = []
    update = trainer.run.kl.update
    trainer.run.kl.update = lambda kl, episodes: (told.append((kl, episodes)), update(kl, episodes))
    trainer.train()
    logs = kit.logs(trainer)
    assert told == [(log["objective/kl"], 8) for log in logs]
    coefficient = 0.05
    for log in logs:  # arXiv 1909.08593, by hand
        assert log["objective/kl_coef"] == pytest.approx(coefficient, rel=1e-6)  # that of this phase
        assert log["objective/non_score_reward"] == pytest.approx(
            -coefficient * log["objective/kl"], rel=1e-4, abs=1e-7
        )
        coefficient *= 1 + np.clip(log["objective/kl"] / 0.5 - 1, -0.2, 0.2) * 8 / 20
