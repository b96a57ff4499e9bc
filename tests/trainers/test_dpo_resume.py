"""What a preference loss carries from step to step comes back from a checkpoint: resumed equals uninterrupted."""

import pytest
import torch

RUNS = {
    "kto": {"loss_type": "kto"},
    "bco": {"loss_type": "bco"},
    "bco_pair": {"loss_type": "bco_pair", "bco_running_shift": True},
    "tr-dpo": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3},
    "live": {"precompute_ref_log_probs": False},
    "simpo": {"loss_type": "simpo"},
}


def make(kit, **settings):
    defaults = {
        "optim": "adamw_torch", "learning_rate": 0.01, "num_train_epochs": 2, "save_strategy": "steps",
        "save_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 1.0,
    }  # fmt: skip
    data = kit.labelled(14) if settings.get("loss_type") in ("kto", "bco") else kit.pairs(14)
    return kit.trainer(kit.model(), data, **(defaults | settings))


@pytest.mark.parametrize("name", RUNS)
def test_resumed_training_ends_in_the_same_weights(kit, name):
    whole = make(kit, **RUNS[name])
    whole.train()
    checkpoint = kit.folder / "out" / "checkpoint-3"
    resumed = make(kit, **RUNS[name])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert whole.state.global_step == resumed.state.global_step == 8
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    for key, value in kit.logs(whole)[-1].items():
        if key != "tokens_per_second":
            assert kit.logs(resumed)[-1][key] == value, key
    assert resumed.run_state() == whole.run_state()


def test_a_running_shift_is_what_the_rewards_were(kit):
    """δ is 0 at the first step, then the middle of the mean rewards of all steps before."""
    trainer = make(kit, loss_type="bco", gradient_accumulation_steps=1, save_strategy="no")
    counts = []
    trainer.data_collator = _counting(trainer.data_collator, counts)
    trainer.train()
    totals, logs = [[0.0, 0], [0.0, 0]], kit.logs(trainer)
    for entry, (good, bad) in zip(logs, counts[-len(logs) :], strict=True):
        means = [total / max(count, 1) for total, count in totals]
        assert entry["delta"] == pytest.approx(sum(means) / 2, rel=1e-5, abs=1e-7)
        for side, (key, count) in enumerate((("rewards/chosen", good), ("rewards/rejected", bad))):
            totals[side][0] += entry.get(key, 0.0) * count
            totals[side][1] += count
    assert abs(logs[-1]["delta"]) > 1e-3


def _counting(collate, counts):
    def collator(examples):
        batch = collate(examples)
        counts.append((int(batch["labels"].sum()), int((~batch["labels"]).sum())))
        return batch

    return collator


def test_checkpoints_of_other_runs_are_refused(kit):
    make(kit, loss_type="sigmoid", max_steps=3).train()
    checkpoint = kit.folder / "out" / "checkpoint-3"
    for settings, own in (({"loss_type": "simpo"}, "no reference"), ({"sync_ref_model": True}, "that follows")):
        with pytest.raises(ValueError, match=rf"trained against reference .*…, this trainer has .*{own}"):
            make(kit, **settings).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="bco_running_shift"):
        make(kit, **RUNS["bco_pair"]).train(resume_from_checkpoint=str(checkpoint))


def test_a_lost_reference_is_missed(kit):
    make(kit, **RUNS["tr-dpo"], max_steps=3).train()
    checkpoint = kit.folder / "out" / "checkpoint-3"
    (checkpoint / "reference.safetensors").rename(kit.folder / "reference.safetensors")
    with pytest.raises(ValueError, match=r"reference.safetensors is missing"):
        make(kit, **RUNS["tr-dpo"]).train(resume_from_checkpoint=str(checkpoint))


def test_the_reference_follows_the_policy(kit):
    """Every second step it becomes α·policy + (1 − α)·reference; the cache has no part in it."""
    trainer = kit.trainer(kit.model(), kit.pairs(8), max_steps=5, learning_rate=0.05, **RUNS["tr-dpo"])
    expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    original = trainer.after_step

    def after_step():
        if trainer.state.global_step in (2, 4):
            for name, p in trainer.model.named_parameters():
                expected[name] = 0.7 * expected[name] + 0.3 * p.detach()
        original()

    trainer.after_step = after_step
    trainer.train()
    reference = dict(trainer._reference._model.named_parameters())
    kit.assert_same(reference, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(reference[name], p) for name, p in kit.model().named_parameters())
    assert not (kit.folder / "cache").exists()
