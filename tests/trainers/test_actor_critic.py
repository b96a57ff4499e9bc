"""Optimizer groups of policy and critic, clipping apart, saving and loading."""

import pytest
import torch

from fastalign.models.actor_critic import ActorCritic


def groups(trainer):
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.actor_critic.named_parameters()}
    return [
        (group["lr"], group["weight_decay"], {names[id(p)].partition(".")[0] for p in group["params"]})
        for group in trainer.optimizer.param_groups
        if group["params"]
    ]


def test_the_critic_has_groups_of_its_own(kit):
    trainer = kit.ppo(learning_rate=0.1, critic_learning_rate=0.3, weight_decay=0.01)
    assert sorted(groups(trainer), key=str) == [
        (0.1, 0.0, {"policy"}), (0.1, 0.01, {"policy"}), (0.3, 0.0, {"critic"}), (0.3, 0.01, {"critic"}),
    ]  # fmt: skip
    every = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, every)) == sorted(map(id, trainer.actor_critic.parameters()))  # each once
    head = kit.ppo(learning_rate=0.1, value_head=True, weight_decay=0.01)
    assert {(lr, *names) for lr, _, names in groups(head)} == {(0.1, "policy"), (0.1, "value_head")}
    assert {name for _, _, names in groups(kit.ppo(advantage_estimator="reinforce")) for name in names} == {"policy"}


def test_learning_rates_are_scheduled_alike(kit):
    trainer = kit.ppo(learning_rate=0.1, critic_learning_rate=0.3, lr_scheduler_type="linear", max_steps=4)
    seen = []
    original = trainer.update_on

    def spy(model, batch, *counts):
        seen.append(sorted({group["lr"] for group in trainer.optimizer.param_groups if group["params"]}))
        return original(model, batch, *counts)

    trainer.update_on = spy
    trainer.train()
    for step, (policy, critic) in enumerate(seen):
        assert policy == pytest.approx(0.1 * (1 - step / 4))
        assert critic == pytest.approx(0.3 * (1 - step / 4))


def test_an_optimizer_that_is_given_is_taken(kit):
    model = kit.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = kit.ppo(model, optimizers=(optimizer, None), advantage_estimator="reinforce")
    assert trainer.create_optimizer() is optimizer
    with pytest.raises(ValueError, match="critic_learning_rate has no effect on an optimizer that is given"):
        kit.ppo(model, optimizers=(optimizer, None), critic_learning_rate=0.1)


def test_a_critics_errors_do_not_scale_the_policys_step(kit):
    """Returns a thousand times as large: the critic is clipped, the policy moves as it did."""

    def moved(scale):
        trainer = kit.ppo(
            reward=lambda completion_ids: [scale * len(ids) for ids in completion_ids], optim="sgd", max_steps=1,
            learning_rate=0.1, max_grad_norm=0.5, num_ppo_epochs=1, num_mini_batches=1, kl_coef=0.0, vf_coef=1.0,
            cliprange_value=None, lam=1.0, whiten_advantages=True,
        )  # fmt: skip
        with torch.no_grad():
            trainer.actor_critic.critic.score.weight.zero_()  # values are 0, advantages the returns
        start = kit.weights(trainer)
        trainer.train()
        change = {name: weight - start[name] for name, weight in kit.weights(trainer).items()}
        return change, kit.logs(trainer)[0]

    (small, one), (large, other) = moved(1.0), moved(1000.0)
    for name, change in small.items():
        if name.startswith("policy"):
            torch.testing.assert_close(large[name], change, rtol=1e-3, atol=1e-6)
    assert other["val/critic_grad_norm"] == pytest.approx(1000 * one["val/critic_grad_norm"], rel=1e-3)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    norm = torch.cat([c.flatten() for n, c in large.items() if n.startswith("critic")]).norm()
    assert float(norm) == pytest.approx(0.1 * 0.5, rel=1e-3)  # learning rate · max_grad_norm


def test_a_value_head_is_saved_beside_the_policy(kit):
    trainer = kit.ppo(value_head=True, learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    out = kit.folder / "out"
    assert (out / "value_head.safetensors").is_file()
    assert not (out / "critic").exists()
    again = ActorCritic(kit.model(), value_head=True)
    again.load_value_head(out)
    assert torch.equal(again.value_head.weight, trainer.actor_critic.value_head.weight)
    assert again.value_head.weight.any()


def test_the_model_card_is_the_policys(kit):
    kit.model().save_pretrained(kit.folder / "policy")
    trainer = kit.ppo(str(kit.folder / "policy"), max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="rewarded")
    assert "rewarded" in (kit.folder / "out" / "README.md").read_text()
