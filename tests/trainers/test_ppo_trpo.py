"""A TRPO step of a phase: the policy's own logits, pieces that add up, and what a trainer refuses or ignores."""

import numpy as np
import pytest
import torch

from fastalign.data import CompletionCollator
from fastalign.models import fuse_head
from fastalign.trainers.batches import split_batch
from fastalign.trainers.ppo_trpo import _Piece, policy_trpo_step, trpo_metrics

SIZES = [(5, 4), (3, 1), (2, 6), (4, 3)]


def make(kit, **config):
    model = fuse_head(kit.model(initializer_range=0.1, **config).double())
    model.set_attn_implementation("eager")
    return model


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for prompt, answer in SIZES:
        ids = rng.integers(3, 61, prompt + answer).tolist()
        examples.append({"input_ids": ids, "completion_mask": [False] * prompt + [True] * answer})
    batch = CompletionCollator(0)(examples)
    batch["old_logps"] = torch.zeros(len(batch["rows"]))
    batch["advantages"] = torch.from_numpy(rng.normal(0, 1, len(batch["rows"])))
    return batch


def log_probs(model, batch, temperature):
    logits = model(input_ids=batch["input_ids"]).logits.detach() / temperature
    return logits.log_softmax(-1).flatten(0, 1)[torch.from_numpy(batch["rows"])]


def test_its_logits_are_the_models(kit):
    model, batch = make(kit), make_batch()
    piece = _Piece(model, batch, temperature=0.7)
    expected = log_probs(model, batch, 0.7)
    torch.testing.assert_close(piece.old, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    targets = batch["targets"].flatten()[torch.from_numpy(batch["rows"])]
    torch.testing.assert_close(
        piece.logps(), expected.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5, check_dtype=False
    )


def test_a_step_is_inside_the_ball_and_pieces_do_not_matter(kit):
    """Measured from outside: KL(π_old‖π) over the vocabulary, and the surrogate, before and after."""
    args = kit.ppo_config(policy_loss="trpo", trpo_max_kl=0.05, temperature=0.7)
    results, weights = [], []
    for tokens in (0, 12):
        model, batch = make(kit), make_batch()
        before = log_probs(model, batch, 0.7)
        pieces = split_batch(batch, tokens)
        assert (len(pieces) == 1) == (tokens == 0)
        result = policy_trpo_step(model, pieces, args)
        after = log_probs(model, batch, 0.7)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert result.accepted
        assert 0 < kl <= 0.05
        assert result.kl == pytest.approx(kl, rel=1e-3)
        targets = batch["targets"].flatten()[torch.from_numpy(batch["rows"])][:, None]
        ratio = (after - before).gather(1, targets)[:, 0].exp()
        gain = ((ratio - 1) * batch["advantages"]).mean()
        assert result.improvement == pytest.approx(float(gain), rel=1e-3)
        results.append(result)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    kit.assert_same(*weights, rtol=1e-3, atol=1e-5)
    metrics = trpo_metrics(results[0], torch.device("cpu"))
    assert float(metrics["policy/trpo_accepted"].value) == 1
    assert float(metrics["policy/trpo_kl"].value) == pytest.approx(results[0].kl)


def eager(kit):
    model = kit.model(initializer_range=0.1)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_run(kit, checkpointing):
    """Checkpointing, on by default, is taken through twice and changes nothing."""
    trainer = kit.ppo(
        eager(kit), policy_loss="trpo", trpo_max_kl=0.05, max_steps=2, gradient_checkpointing=checkpointing
    )
    before = kit.weights(trainer)
    trainer.train()
    for log in kit.logs(trainer):
        assert log["policy/trpo_accepted"] == 1
        assert 0 < log["policy/trpo_kl"] <= 0.05
        assert "policy/clipfrac_avg" not in log
        assert log["loss/value_avg"] > 0
    moved = {n.partition(".")[0] for n, p in kit.weights(trainer).items() if not torch.equal(p, before[n])}
    assert moved == {"policy", "critic"}


def test_without_a_critic_no_optimizer_moves_the_policy(kit):
    trainer = kit.ppo(
        eager(kit), policy_loss="trpo", advantage_estimator="rloo", num_generations=2, trpo_max_kl=1e-9,
        learning_rate=10.0, weight_decay=0.5, max_steps=1, num_ppo_epochs=4,
    )  # fmt: skip
    before = kit.weights(trainer)
    trainer.train()
    for name, weight in kit.weights(trainer).items():
        torch.testing.assert_close(weight, before[name], rtol=1e-2, atol=1e-3, msg=name)
    (log,) = kit.logs(trainer)
    assert log["policy/trpo_kl"] <= 1e-9 or not log["policy/trpo_accepted"]
    assert log["loss"] == pytest.approx(-log["policy/trpo_improvement"], abs=1e-9)


def test_attention_without_second_derivatives_is_refused(kit):
    with pytest.raises(ValueError, match="attn_implementation='sdpa' of LlamaForCausalLM"):
        kit.ppo(kit.model(), policy_loss="trpo")
