"""PROTrainer on a tiny policy: the loss it takes, runs that must be equal, references, adapters, resuming."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig

from fastalign.data import lists_to_pairs, pairs_to_lists
from fastalign.losses import infonce_loss, pro_loss
from fastalign.reference import TokenSequence, score
from fastalign.trainers.reference import ReferenceMismatchError

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: what is left is the order of sums
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
VARIANTS = {
    "paper": {},
    "tempered": {"reward_temperatures": True, "beta": 0.7},
    "relative": {"reference_free": False, "beta": 0.5},
    "infonce": {"loss_type": "infonce", "sft_coef": 0.5, "length_normalize": False, "beta": 0.1},
}


def first_log(trainer):
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def sums(model, lists):
    """Summed log-probs of every response, and the tokens of each."""
    sequences = [TokenSequence(e["prompt_ids"] + ids, len(e["prompt_ids"])) for e in lists for ids in e["response_ids"]]
    values = score(model, sequences)
    return torch.tensor([x.sum(dtype=np.float64) for x in values]), torch.tensor([len(x) for x in values])


# ---- the loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_loss_is_that_of_the_formula(kit, variant):
    settings = VARIANTS[variant]
    lists = kit.lists(6, scores=True)
    ref_model = kit.model(seed=7) if variant == "relative" else None
    trainer = kit.pro(kit.model(), lists, ref_model=ref_model, per_device_train_batch_size=6, max_steps=1, **settings)
    log = first_log(trainer)
    logps, lengths = sums(kit.model(), lists)
    if variant == "relative":
        scores = 0.5 * (logps - sums(kit.model(seed=7), lists)[0])
    else:
        scores = settings.get("beta", 1.0) * (logps / (1 if variant == "infonce" else lengths))
    ranks = torch.tensor([r for own in lists["ranks"] for r in own])
    cu = torch.tensor([0, *np.cumsum([len(own) for own in lists["ranks"]])])
    rewards = torch.tensor([s for own in lists["scores"] for s in own]) if variant == "tempered" else None
    loss_fn = infonce_loss if variant == "infonce" else pro_loss
    expected = loss_fn(scores, ranks, cu_lists=cu, rewards=rewards)
    total, nll = float(expected.loss), []
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        best = ranks[a:b] == ranks[a:b].min()
        nll.append(float((-logps / lengths)[a:b][best].mean()))
        weight = {"relative": 0.0, "infonce": 0.5}.get(variant, 0.05 * (b - a - 1) ** 2)
        total += weight * nll[-1] / 6
    assert log["loss"] == pytest.approx(total, rel=1e-4)
    assert log["nll_loss"] == pytest.approx(np.mean(nll), rel=1e-4)
    for name in ("accuracy", "margin", "top1_accuracy", "scores/best", "scores/worst"):
        assert log[name] == pytest.approx(float(expected.metrics[name].value), rel=1e-3, abs=1e-5), name


def test_pairs_measured_from_a_reference_train_as_dpo_does(kit):
    pairs = kit.pairs(8)
    settings = {"beta": 0.5, "num_train_epochs": 2, "train_sampling_strategy": "sequential"}
    dpo = kit.trainer(kit.model().double(), pairs, **settings)
    dpo.train()
    pro = kit.pro(kit.model().double(), pairs, reference_free=False, **settings)
    pro.train()
    kit.assert_same(kit.weights(pro), kit.weights(dpo), **EXACT)
    for a, b in zip(kit.logs(pro), kit.logs(dpo), strict=True):
        for mine, theirs in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
            assert a[mine] == pytest.approx(b[theirs], rel=1e-6, abs=1e-9)
        assert a["length/margin_correlation"] == pytest.approx(b["length/margin_correlation"], rel=1e-4)


def test_dpo_trains_on_lists_by_their_pairs(kit):
    """Tokenised lists through `lists_to_pairs`; with two responses each, DPO on them is PRO from the reference."""
    lists = pairs_to_lists(kit.pairs(8))
    settings = {"beta": 0.5, "max_steps": 2, "train_sampling_strategy": "sequential"}
    dpo = kit.trainer(kit.model().double(), lists_to_pairs(lists), **settings)
    pro = kit.pro(kit.model().double(), lists, reference_free=False, **settings)
    dpo.train()
    pro.train()
    kit.assert_same(kit.weights(pro), kit.weights(dpo), **EXACT)
    assert len(kit.trainer(kit.model(), lists_to_pairs(kit.lists(4), "all")).train_dataset) > 4


def test_it_learns_the_ranking(kit):
    """Good responses end with token 5, worse ones with 6 and 7: the order is learnt, and the loss falls."""
    rng = np.random.default_rng(0)

    def ids(last):
        return [*rng.integers(10, 61, rng.integers(1, 6)).tolist(), last]

    rows = [
        {"prompt_ids": ids(9), "response_ids": [ids(7), ids(5), ids(6), ids(5)], "ranks": [3.0, 1.0, 2.0, 1.0]}
        for _ in range(48)
    ]
    data, held_out = Dataset.from_list(rows[:32]), Dataset.from_list(rows[32:])
    for settings in ({}, {"reference_free": False, "beta": 1.0}):
        trainer = kit.pro(
            kit.model(initializer_range=0.1), data, held_out, optim="adamw_torch", learning_rate=6e-3,
            num_train_epochs=6, **settings,
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_accuracy"] > 0.9, settings
        assert after["eval_top1_accuracy"] > 0.9, settings
        assert after["eval_loss"] < before["eval_loss"]


# ---- runs that must be equal


def run(kit, **settings):
    """Two epochs over 22 lists in 8-list steps, without shuffling, in float64."""
    defaults = {
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", "backend": "torch", "reward_temperatures": True,
    }  # fmt: skip
    trainer = kit.pro(kit.model().double(), kit.lists(22, scores=True), **(defaults | settings))
    trainer.train()
    return kit.weights(trainer), kit.logs(trainer)


@pytest.mark.parametrize("variant", ["tempered", "relative"])
def test_the_split_of_a_batch_changes_nothing(kit, variant):
    whole = run(kit, per_device_train_batch_size=8, micro_batch_tokens=0, **VARIANTS[variant])
    for split in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "micro_batch_tokens": 100},
        {"per_device_train_batch_size": 8, "micro_batch_tokens": 1},
        {"per_device_train_batch_size": 8, "workspace_mb": 0.05},
        {"per_device_train_batch_size": 8, "schedule": "deferred", "gradient_checkpointing": True},
    ):
        weights, logs = run(kit, **VARIANTS[variant], **split)
        kit.assert_same(weights, whole[0], **EXACT)
        assert len(logs) == len(whole[1]) == 6
        for got, expected in zip(logs, whole[1], strict=True):
            for name in expected.keys() - {"tokens_per_second", "epoch", "learning_rate", "grad_norm"}:
                assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), (split, name)


def test_two_processes_give_what_one_gives(kit, tmp_path):
    settings = {
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2, "micro_batch_tokens": 64, "backend": "torch", "reference_free": False,
        "reward_temperatures": True, "sft_coef": 0.1,
    }  # fmt: skip
    folder = tmp_path / "two"
    folder.mkdir()
    worker = [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder), json.dumps(settings), "pro"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(worker, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in "01"]
    data = kit.lists(24, scores=True), kit.lists(7, seed=1, scores=True)
    one = kit.pro(kit.model().double(), *data, **(settings | {"per_device_train_batch_size": 8}))
    one.train()
    metrics = one.evaluate()
    for process in workers:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    two = torch.load(folder / "result.pt")
    kit.assert_same(two["weights"], kit.weights(one), **EXACT)
    for mine, expected in ((two["logs"], kit.logs(one)), ([two["eval"]], [metrics])):
        for a, b in zip(mine, expected, strict=True):
            for name in b.keys() - {"tokens_per_second", "epoch", "step", "learning_rate", "grad_norm"}:
                if not name.endswith(("runtime", "per_second")):
                    assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
    assert metrics["eval_accuracy_se"] > 0


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_resumed_training_is_the_uninterrupted_one(kit, adapter):
    def make():
        lora = LoraConfig(**LORA, lora_dropout=0.3) if adapter else None  # dropout: the random state must come back too
        return kit.pro(
            kit.model(), kit.lists(22), peft_config=lora, num_train_epochs=2, optim="adamw_torch", learning_rate=0.01,
            save_strategy="steps", save_steps=4, gradient_accumulation_steps=2, max_grad_norm=1.0,
            reference_free=not adapter,
        )  # fmt: skip

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-4"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    last, expected = kit.logs(resumed)[-1], kit.logs(whole)[-1]
    for name in expected.keys() - {"tokens_per_second"}:
        assert last[name] == expected[name], name


def test_a_checkpoint_of_another_reference_is_refused(kit):
    settings = {"save_strategy": "steps", "save_steps": 1}
    kit.pro(reference_free=False, max_steps=1, **settings).train()
    checkpoint = str(kit.folder / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"trained against reference .* this trainer has no reference"):
        kit.pro(max_steps=2).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="trained against reference"):
        kit.pro(kit.model(seed=5), max_steps=2, reference_free=False).train(resume_from_checkpoint=checkpoint)


# ---- references


def test_the_cache_is_shared_with_dpo_and_by_all_settings(kit):
    pairs = kit.pairs(6)
    assert kit.trainer(kit.model(), pairs).reference_cache.report.computed == 12
    trainer = kit.pro(train=pairs, reference_free=False)
    assert (trainer.reference_cache.report.cached, trainer.reference_cache.report.computed) == (12, 0)
    again = kit.pro(train=pairs_to_lists(pairs), reference_free=False, loss_type="infonce", beta=2.0)
    assert again.reference_cache.report.cached == 12
    assert "12 found, 0 computed" in again.summary_lines()[0]
    assert kit.pro().reference_cache is None


def test_a_policy_that_is_its_own_reference_starts_at_zero(kit):
    trainer = kit.pro(reference_free=False, max_steps=1, per_device_train_batch_size=8)
    assert trainer.check_start() < 1e-4
    log = first_log(trainer)
    assert log["scores/best"] == pytest.approx(0, abs=1e-3)
    expected = 0.0  # −log of one in all that are behind, and itself
    for ranks in kit.lists(8)["ranks"]:
        expected += sum(math.log(1 + sum(other > own for other in ranks)) for own in ranks) / 8
    assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert kit.pro().check_start() is None
    assert kit.pro(ref_model=kit.model(seed=5), reference_free=False).check_start() is None


def test_log_probs_of_another_model_are_noticed(kit, monkeypatch):
    kit.pro(reference_free=False)
    trainer = kit.pro(reference_free=False)
    monkeypatch.setattr(type(trainer.reference_cache), "lookup", kit.tampered(trainer))
    with pytest.raises(ReferenceMismatchError, match=r"of example .* nats a token away"):
        kit.pro(reference_free=False).train()


def test_new_data_can_be_evaluated_while_the_reference_is_there(kit):
    trainer = kit.pro(kit.model(), kit.lists(4), kit.lists(3, seed=1), reference_free=False, max_steps=2)
    assert trainer.evaluate(kit.lists(3, seed=2))["eval_scores/best"] == pytest.approx(0, abs=1e-3)
    trainer.train()
    assert trainer.evaluate(kit.lists(3, seed=2))["eval_scores/best"] != 0  # its log-probs are cached
    with pytest.raises(ValueError, match="the reference is gone"):
        trainer.evaluate(kit.lists(3, seed=3))


def test_reference_log_probs_in_the_data_are_left_out_without_a_reference(kit):
    rows = [
        e | {"ref_response_logps": [[-1.0] * len(ids) for ids in e["response_ids"]]} for e in kit.lists(4).to_list()
    ]
    plain = first_log(kit.pro(train=kit.lists(4), max_steps=1))["loss"]
    assert first_log(kit.pro(train=Dataset.from_list(rows), max_steps=1))["loss"] == plain


# ---- what trains


def test_lora_trains_the_adapter_alone(kit):
    policy = kit.model()
    base = {name: p.clone() for name, p in policy.named_parameters()}
    trainer = kit.pro(policy, peft_config=LoraConfig(**LORA), max_steps=3, reference_free=False)
    assert trainer.check_start() < 1e-4
    before = kit.weights(trainer)
    trainer.train()
    after = kit.weights(trainer)
    assert all("lora_" in name for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")])


def test_router_loss_is_added_with_its_weight(kit):
    def first(**settings):
        mixture = kit.model(
            kind=tf.MixtralForCausalLM, config=tf.MixtralConfig, num_local_experts=4, router_aux_loss_coef=0.5
        )
        return first_log(kit.pro(mixture, kit.lists(4), max_steps=1, **settings))

    own, off = first(), first(router_aux_loss_coef=0.0)
    assert own["loss"] == pytest.approx(off["loss"] + 0.5 * own["aux_loss"], rel=1e-5)


def test_bfloat16_autocast_over_float32_weights(kit):
    exact, mixed = (
        kit.pro(num_train_epochs=2, learning_rate=0.01, reference_free=False, **settings)
        for settings in ({}, {"bf16": True})
    )
    exact.train()
    mixed.train()
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    for a, b in zip(kit.logs(mixed), kit.logs(exact), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.1)
        assert a["nll_loss"] != b["nll_loss"]


def test_references_that_cannot_be_are_refused(kit):
    with pytest.raises(ValueError, match="ref_model is given, and reference_free=True"):
        kit.pro(ref_model=kit.model())
    policy = kit.model()
    with pytest.raises(ValueError, match="ref_model is the model that trains"):
        kit.pro(policy, ref_model=policy, reference_free=False)
    with pytest.raises(ValueError, match="name two references"):
        kit.pro(ref_model=kit.model(), reference_free=False, ref_model_name_or_path="x")
    with pytest.raises(ValueError, match="no data: give train_dataset"):
        kit.pro().__class__(kit.model(), args=kit.pro().args, processing_class=kit.tokenizer)
