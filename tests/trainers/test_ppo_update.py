"""The loss of a mini-batch against plain PyTorch: logits, log_softmax, the pure losses, autograd."""

import numpy as np
import pytest
import torch

from fastalign.data import CompletionCollator
from fastalign.losses import ppo_loss, ppo_penalty_loss, value_loss
from fastalign.models.actor_critic import ActorCritic, scalar_model_from
from fastalign.trainers.batches import split_batch
from fastalign.trainers.ppo_update import policy_value_loss
from fastalign.types import IGNORE_INDEX

SIZES = [(5, 4), (3, 1), (2, 6), (4, 3)]  # prompt and completion


def make_batch(seed=0):
    """Log-probs near a policy's own would do; what matters is that ratios lie on all sides of the clip."""
    rng = np.random.default_rng(seed)
    examples = []
    for prompt, answer in SIZES:
        ids = rng.integers(3, 61, prompt + answer).tolist()
        examples.append({"input_ids": ids, "completion_mask": [False] * prompt + [True] * answer})
    batch = CompletionCollator(0)(examples)
    n = len(batch["rows"])
    batch["old_logps"] = torch.from_numpy(rng.normal(-4.1, 0.5, n))
    for name in ("advantages", "returns", "old_values"):
        batch[name] = torch.from_numpy(rng.normal(0, 1, n))
    batch["ref_logps"] = batch["old_logps"] + torch.from_numpy(rng.normal(0, 0.3, n))
    return batch


def make_model(kit, critic="own"):
    policy = kit.model(initializer_range=0.1).double()
    if critic == "head":
        model = ActorCritic(policy, value_head=True).double()
        torch.nn.init.normal_(model.value_head.weight, std=0.1)
        return model
    return ActorCritic(policy, scalar_model_from(policy).double() if critic else None)


def grids(batch):
    """(B, T) tensors and the mask."""
    mask = batch["targets"] != IGNORE_INDEX

    def spread(name):
        return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, batch[name])

    return {name: spread(name) for name in ("old_logps", "advantages", "ref_logps", "returns", "old_values")}, mask


def plain(model, batch, args, penalty_coef):
    """(loss, metrics) from the model's own logits."""
    grid, mask = grids(batch)
    logits = model.policy(input_ids=batch["input_ids"]).logits / args.temperature
    distribution = logits.log_softmax(-1)
    logps = distribution.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    common = {"aggregation": args.loss_aggregation, "max_completion_length": args.max_completion_length}
    if args.policy_loss == "penalty":
        policy = ppo_penalty_loss(
            logps, grid["old_logps"], grid["advantages"], mask, penalty_coef=penalty_coef, **common
        )
    else:
        policy = ppo_loss(
            logps, grid["old_logps"], grid["advantages"], mask, ref_logps=grid["ref_logps"], entropy=entropy,
            loss_type=args.loss_type, importance_sampling_level=args.importance_sampling_level,
            epsilon_low=args.cliprange, epsilon_high=args.epsilon_high, dual_clip=args.dual_clip,
            kl_coef=args.kl_loss_coef, kl_estimator=args.kl_loss_estimator, entropy_coef=args.entropy_coef, **common,
        )  # fmt: skip
    loss, metrics = policy.loss, dict(policy.metrics)
    if model.critic is not None:
        values = model.critic.score(model.critic.model(input_ids=batch["input_ids"]).last_hidden_state)[..., 0]
    elif model.value_head is not None:
        values = model.value_head(model.policy.model(input_ids=batch["input_ids"]).last_hidden_state)[..., 0]
    else:
        return loss, metrics
    critic = value_loss(
        values, grid["returns"], mask, old_values=grid["old_values"], epsilon_value=args.cliprange_value
    )
    return loss + args.vf_coef * critic.loss, metrics | {
        f"val/{name}": metric for name, metric in critic.metrics.items()
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


NAMES = {
    "approx_kl": "policy/approxkl_avg", "approx_kl_k3": "policy/approxkl_k3", "clip_fraction": "policy/clipfrac_avg",
    "clip_fraction/low": "policy/clipfrac_low", "clip_fraction/high": "policy/clipfrac_high", "ratio": "val/ratio",
    "kl": "policy/kl", "val/values": "val/values", "val/returns": "val/returns",
    "val/clip_fraction": "val/clipfrac_avg",
}  # fmt: skip
VARIANTS = {
    "clip": {},
    "clip higher, dual clip": {"cliprange_high": 0.5, "dual_clip": 1.5},
    "temperature": {"temperature": 0.7},
    "entropy bonus": {"entropy_coef": 0.1},
    "KL in the loss": {"kl_loss_coef": 0.3, "kl_loss_estimator": "k2"},
    "sequence mean": {"loss_aggregation": "sequence_mean", "entropy_coef": 0.1},
    "sequence sum": {"loss_aggregation": "sequence_sum", "kl_loss_coef": 0.3},
    "constant": {"loss_aggregation": "constant"},
    "ratios of sequences": {"importance_sampling_level": "sequence", "loss_aggregation": "sequence_mean"},
    "GSPO-token": {"importance_sampling_level": "sequence_token", "loss_aggregation": "sequence_mean"},
    "cispo": {"loss_type": "cispo", "advantage_estimator": "gae", "cliprange_high": 0.1},
    "penalty": {"policy_loss": "penalty"},
    "penalty, sequence mean": {"policy_loss": "penalty", "loss_aggregation": "sequence_mean", "temperature": 1.3},
    "no value clip": {"cliprange_value": None},
    "deferred": {"schedule": "deferred"},
    "penalty, deferred": {"policy_loss": "penalty", "schedule": "deferred"},
    "small workspace": {"workspace_mb": 0.005},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("critic", ["own", "head"])
def test_fused_is_unfused(kit, settings, critic):
    """Loss, gradients of every parameter and metrics, in float64."""
    args, model, batch = kit.ppo_config(backend="torch", **settings), make_model(kit, critic), make_batch()
    expected, metrics = plain(model, batch, args, penalty_coef=2.5)
    expected_gradients = gradients(model, expected)
    tokens, sequences = len(batch["rows"]), len(SIZES)
    output = policy_value_loss(model, batch, args, tokens=tokens, sequences=sequences, penalty_coef=2.5)
    torch.testing.assert_close(output.loss, expected.float(), rtol=1e-6, atol=1e-6, check_dtype=False)
    got = gradients(model, output.loss)
    assert got.keys() == expected_gradients.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-7, msg=name)
    compared = 0
    for name, ours in NAMES.items():
        if name in metrics and ours in output.metrics:
            assert float(output.metrics[ours].value) == pytest.approx(float(metrics[name].value), rel=1e-6, abs=1e-7), (
                name
            )
            compared += 1
    assert compared >= (9 if args.policy_loss == "penalty" else 10)
    assert 0 < float(output.metrics["policy/clipfrac_avg"].value) < 1  # the batch is on all sides of the clip


def test_entropy_is_that_of_the_tempered_distribution(kit):
    args, model, batch = kit.ppo_config(backend="torch", temperature=0.7), make_model(kit), make_batch()
    logits = model.policy(input_ids=batch["input_ids"]).logits / 0.7
    entropy = torch.distributions.Categorical(logits=logits).entropy()[batch["targets"] != IGNORE_INDEX].mean()
    for loss in ("clip", "penalty"):
        args.policy_loss = loss
        found = policy_value_loss(model, batch, args, tokens=14, sequences=4, penalty_coef=1.0).metrics
        assert float(found["policy/entropy_avg"].value) == pytest.approx(float(entropy.detach()), rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_pieces_add_up_to_the_whole(kit, aggregation):
    """Cut between sequences, with the whole's counts: same loss, gradients and metrics, losses' averages included."""
    args, model, batch = kit.ppo_config(backend="torch", loss_aggregation=aggregation), make_model(kit), make_batch()
    whole = policy_value_loss(model, batch, args, tokens=14, sequences=4, penalty_coef=1.0)
    expected = gradients(model, whole.loss)
    pieces = split_batch(batch, 16)
    assert len(pieces) == 3
    outputs = [policy_value_loss(model, p, args, tokens=14, sequences=4, penalty_coef=1.0) for p in pieces]
    got = gradients(model, torch.stack([output.loss for output in outputs]).sum())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-9, msg=name)
    for name, metric in whole.metrics.items():
        merged = outputs[0].metrics[name]
        for output in outputs[1:]:
            merged = merged.merge(output.metrics[name])
        assert float(merged.value) == pytest.approx(float(metric.value), rel=1e-5, abs=1e-7), name
    parts = float(whole.metrics["loss/policy_avg"].value) + args.vf_coef * float(whole.metrics["loss/value_avg"].value)
    assert parts == pytest.approx(whole.loss.item(), rel=1e-5)


def test_padding_and_prompts_never_enter(kit):
    """What stands in padded positions, and between them, changes nothing (TRL's INVALID_LOGPROB polluted means)."""
    args, model, batch = kit.ppo_config(), make_model(kit), make_batch()
    whole = policy_value_loss(model, batch, args, tokens=14, sequences=4, penalty_coef=1.0)
    wider = dict(batch)
    padding = torch.full((4, 5), 60)
    wider["input_ids"] = torch.cat([batch["input_ids"], padding], 1)
    wider["targets"] = torch.cat([batch["targets"], torch.full((4, 5), IGNORE_INDEX)], 1)
    old_width = batch["input_ids"].shape[1]
    wider["rows"] = batch["rows"] // old_width * (old_width + 5) + batch["rows"] % old_width
    again = policy_value_loss(model, wider, args, tokens=14, sequences=4, penalty_coef=1.0)
    for name, metric in whole.metrics.items():
        assert float(again.metrics[name].value) == pytest.approx(float(metric.value), rel=1e-6), name
        assert float(metric.weight) in (14, 4), name


def test_policy_and_critic_can_be_left_out(kit):
    args, model, batch = kit.ppo_config(), make_model(kit), make_batch()
    counts = {"tokens": 14, "sequences": 4, "penalty_coef": 1.0}
    both = policy_value_loss(model, batch, args, **counts)
    critic = policy_value_loss(model, batch, args, **counts, policy_coef=None)
    assert not [name for name in critic.metrics if name.startswith("policy/") or name == "val/ratio"]
    assert all(name.startswith("critic.") for name in gradients(model, critic.loss))
    policy = policy_value_loss(model, batch, args, **counts, with_value=False)
    assert all(name.startswith("policy.") for name in gradients(model, policy.loss))
    assert float((policy.loss + critic.loss).detach()) == pytest.approx(float(both.loss), rel=1e-6)
    along = policy_value_loss(model, batch, args, **counts, policy_coef=0.0)
    assert float(along.loss) == pytest.approx(float(critic.loss), rel=1e-6)
    assert along.metrics.keys() == critic.metrics.keys()
    found = gradients(model, along.loss)
    assert any(name.startswith("policy.") for name in found)  # it takes part in the backward
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith("policy."))


def test_an_adapter_on_the_head_is_seen(kit):
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(kit.model(initializer_range=0.1).double(), LoraConfig(r=4, target_modules=["lm_head"]))
    torch.nn.init.normal_(policy.base_model.model.lm_head.lora_B["default"].weight, std=0.1)
    model, batch, args = ActorCritic(policy, value_head=True).double(), make_batch(), kit.ppo_config(backend="torch")
    torch.nn.init.normal_(model.value_head.weight, std=0.1)
    hidden = policy.base_model.model.model(input_ids=batch["input_ids"]).last_hidden_state
    output = policy_value_loss(model, batch, args, tokens=14, sequences=4, penalty_coef=1.0)
    grid, mask = grids(batch)
    logps = policy(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    logps = logps.gather(-1, batch["targets"].clamp(min=0)[..., None])[..., 0]
    expected = ppo_loss(logps, grid["old_logps"], grid["advantages"], mask).loss
    values = model.value_head(hidden)[..., 0]
    expected = (
        expected
        + args.vf_coef
        * value_loss(values, grid["returns"], mask, old_values=grid["old_values"], epsilon_value=0.2).loss
    )
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-6)
    assert gradients(model, output.loss)["policy.base_model.model.lm_head.lora_B.default.weight"].any()
