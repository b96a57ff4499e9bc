"""Every loss of the table in DPOTrainer: its value from the model's own logits, and runs that must be equal."""

import math

import numpy as np
import pytest
import torch

from fastalign.losses import DPO_LOSSES, dpo_loss, kto_kl, kto_loss

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: what is left is the order of sums
NEEDED = {"exo_pair": {"label_smoothing": 0.1}, "bco_pair": {"bco_running_shift": True}}
SEPARABLE = [name for name, variant in DPO_LOSSES.items() if not variant.couples_batch]
COUPLED = [name for name, variant in DPO_LOSSES.items() if variant.couples_batch]
MORE = {  # options that reach the loss by ways of their own
    "list": {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 1.0, 0.2]},
    "orpo and sft": {"loss_type": ["orpo", "sft"]},
    "ld_alpha": {"ld_alpha": 0.3},
    "use_weighting": {"use_weighting": True},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "loss_type": "ipo"},
    "weights of labels": {"loss_type": "kto", "desirable_weight": 0.5, "undesirable_weight": 2.0},
}
SETTINGS = {name: {"loss_type": name} | NEEDED.get(name, {}) for name in DPO_LOSSES} | MORE


def rows_of(settings):
    names = settings.get("loss_type", "sigmoid")
    return DPO_LOSSES[names if isinstance(names, str) else names[0]].rows


def needs_reference(settings):
    names = settings.get("loss_type", "sigmoid")
    return any(DPO_LOSSES[name].needs_reference for name in ([names] if isinstance(names, str) else names))


def make(kit, settings, n=8, *, model=None, evaluation=None, **more):
    """A policy that is not its reference, where there is one; sequential batches."""
    data = kit.labelled(n) if rows_of(settings) == "responses" else kit.pairs(n)
    reference = kit.model(seed=7) if needs_reference(settings) else None
    more = {"train_sampling_strategy": "sequential"} | more
    policy = kit.model() if model is None else model
    return kit.trainer(policy, data, evaluation, ref_model=reference, **(settings | more))


def naive(model, prompt, completion):
    """Log-probs and log Σp² of a completion's tokens, from the model's logits in float64."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        log_probs = model.eval()(input_ids=ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    picked = log_probs.gather(1, torch.as_tensor(np.asarray(completion, np.int64))[:, None])[:, 0]
    return picked, log_probs.mul(2).logsumexp(-1)


def naive_loss(policy, reference, examples, args, kl_examples=None):
    """The loss on examples by `losses`, from log-probs that are made one by one."""
    if args.on_pairs:
        return _naive_pairs(policy, reference, examples, args)
    sums = [
        torch.stack([naive(model, e["prompt_ids"], e["completion_ids"])[0].sum() for e in examples])
        for model in (policy, reference)
    ]
    kl = None
    if args.needs_kl:
        mismatched = [
            torch.stack([naive(m, e["prompt_ids"], e["kl_completion_ids"])[0].sum() for e in kl_examples or examples])
            for m in (policy, reference)
        ]
        kl = kto_kl(*mismatched).value
    labels = torch.tensor([bool(e["label"]) for e in examples])
    return float(kto_loss(*sums, labels, kl=kl, **args.loss_options()).loss)


def _naive_pairs(policy, reference, examples, args):
    parts = {
        side: [[naive(m, e["prompt_ids"], e[f"{side}_ids"]) for e in examples] for m in (policy, reference)]
        for side in ("chosen", "rejected")
    }
    models = range(2 if args.needs_reference else 1)
    logps = [torch.stack([x.sum() for x, _ in parts[side][m]]) for m in models for side in ("chosen", "rejected")]
    lengths = [torch.tensor([len(e[f"{side}_ids"]) for e in examples]) for side in ("chosen", "rejected")]
    options = args.loss_options()
    if args.ld_alpha is not None:
        shared = torch.minimum(*lengths)
        options["tail_logps"] = [
            torch.stack([x[k:].sum() for (x, _), k in zip(parts[side][m], shared, strict=True)])
            for m in models
            for side in ("chosen", "rejected")
        ]
    if args.use_weighting:
        means = [torch.stack([(x - q).mean() for x, q in parts[side][0]]) for side in ("chosen", "rejected")]
        options["weights"] = torch.exp(means[0] + means[1])
    return float(dpo_loss(*logps, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options).loss)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_loss_is_the_formulas_and_it_trains(kit, name):
    trainer = make(kit, SETTINGS[name], per_device_train_batch_size=4, max_grad_norm=1.0, max_steps=4)
    before = kit.weights(trainer)
    examples = [trainer.train_dataset[i] for i in range(4)]
    trainer.train()
    logs = kit.logs(trainer)
    assert logs[0]["loss"] == pytest.approx(
        naive_loss(kit.model(), kit.model(seed=7), examples, trainer.args), rel=2e-5
    )
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    assert len(logs) == 4
    assert any(not torch.equal(value, before[key]) for key, value in kit.weights(trainer).items())
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "entropy"} <= logs[0].keys()
    for entry in logs:
        assert entry["rewards/margins"] == pytest.approx(
            entry["rewards/chosen"] - entry["rewards/rejected"], rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in COUPLED])
def test_the_split_of_a_step_changes_nothing(kit, name):
    """Three steps of six examples, in one batch each, and in three of two that are cut further."""

    def run(**split):
        trainer = make(
            kit,
            SETTINGS[name],
            12,
            model=kit.model().double(),
            backend="torch",
            max_grad_norm=1.0,
            max_steps=3,
            **split,
        )
        trainer.train()
        return kit.weights(trainer), kit.logs(trainer)

    weights, logs = run(per_device_train_batch_size=6, micro_batch_tokens=0)
    split, split_logs = run(per_device_train_batch_size=2, gradient_accumulation_steps=3, micro_batch_tokens=30)
    kit.assert_same(split, weights, **EXACT)
    assert len(logs) == 3
    for got, expected in zip(split_logs, logs, strict=True):
        for key in expected.keys() - {"tokens_per_second", "epoch", "learning_rate", "grad_norm"}:
            assert got[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_of_ranks_sorts_each_device_batch(kit, name):
    """Accumulation averages the losses of the device batches; they are not cut, and cutting is refused."""
    trainer = make(
        kit, SETTINGS[name], per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, logging_steps=1
    )  # fmt: skip
    batches = [[trainer.train_dataset[i] for i in range(start, start + 4)] for start in (0, 4)]
    assert trainer.micro_batch_tokens == 0
    trainer.train()
    expected = [naive_loss(kit.model(), kit.model(seed=7), batch, trainer.args) for batch in batches]
    assert kit.logs(trainer)[0]["loss"] == pytest.approx(np.mean(expected), rel=2e-5)
    whole = naive_loss(kit.model(), kit.model(seed=7), batches[0] + batches[1], trainer.args)
    assert abs(whole - np.mean(expected)) > 1e-4  # the batch matters
    with pytest.raises(ValueError, match=rf"micro_batch_tokens=64.*{name}"):
        kit.config(loss_type=name, micro_batch_tokens=64)
    with pytest.raises(ValueError, match=rf"streamed.*{name}"):
        kit.config(loss_type=name, schedule="streamed")


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired", "list", "orpo and sft", "orpo"])
@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_does_not_depend_on_its_batches(kit, name, size):
    settings = SETTINGS[name]
    held_out = kit.labelled(7, 1) if rows_of(settings) == "responses" else kit.pairs(7, 1)
    trainer = make(kit, settings, 4, evaluation=held_out, per_device_eval_batch_size=size, micro_batch_tokens=40)
    examples = [trainer.eval_dataset[i] for i in range(7)]
    expected = naive_loss(kit.model(), kit.model(seed=7), examples, trainer.args)
    got = trainer.evaluate()
    assert got["eval_loss"] == pytest.approx(expected, rel=2e-5)
    again = trainer.evaluate(held_out, metric_key_prefix="again")
    assert again["again_loss"] == pytest.approx(expected, rel=2e-5)


def test_a_loss_without_reference_makes_no_cache(kit):
    for name in ("simpo", "orpo", "cpo", "sft"):
        trainer = kit.trainer(kit.model(), kit.pairs(4), kit.pairs(3, seed=1), loss_type=name, max_steps=1)
        assert trainer.check_start() is None
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
        with pytest.raises(ValueError, match=name):
            _ = trainer.reference_cache
        assert trainer.summary_lines() == []
    assert not (kit.folder / "cache").exists()
    with pytest.raises(ValueError, match=r"ref_model is given.*simpo"):
        kit.trainer(kit.model(), kit.pairs(4), ref_model=kit.model(seed=7), loss_type="simpo")


def test_sft_and_a_loss_with_a_reference_has_one(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(4), loss_type=["sft", "sigmoid"])
    assert len(trainer.reference_cache) == 8
