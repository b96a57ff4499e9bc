"""Equality of runs: how a batch is split over accumulation steps, micro-batches and processes changes nothing."""

import json
import math
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: what is left is the order of sums
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "length/margin_correlation", "entropy")


def run(kit, n=22, **settings):
    """Two epochs over n pairs in 8-pair steps (22: the last step has 6), without shuffling, in float64."""
    settings = {"num_train_epochs": 2, "train_sampling_strategy": "sequential", "backend": "torch"} | settings
    trainer = kit.trainer(kit.exact_model(), kit.pairs(n), **settings)
    trainer.train()
    return kit.weights(trainer), kit.logs(trainer)


@pytest.fixture
def whole(kit):
    return run(kit, per_device_train_batch_size=8, micro_batch_tokens=0)


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "micro_batch_tokens": 64},
        {"per_device_train_batch_size": 8, "micro_batch_tokens": 1},
        {"per_device_train_batch_size": 8, "micro_batch_tokens": 150},
        {"per_device_train_batch_size": 8, "micro_batch_tokens": 0, "pad_to_multiple_of": 64},
        {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 8, "schedule": "deferred"},
        {"per_device_train_batch_size": 8, "workspace_mb": 0.05},
        {"per_device_train_batch_size": 8, "token_metrics": False},
    ],
    ids=lambda split: "-".join(f"{name}={value}" for name, value in split.items()),
)
def test_the_split_of_a_batch_changes_nothing(kit, whole, split):
    weights, logs = run(kit, **split)
    padded = "pad_to_multiple_of" in split  # which no other layout has
    kit.assert_same(weights, whole[0], **EXACT)
    assert len(logs) == len(whole[1]) == 6
    for got, expected in zip(logs, whole[1], strict=True):
        assert (got["padding_waste"] > 0) == padded
        for name in METRICS:
            if name in got:
                assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
        assert got["num_tokens"] == expected["num_tokens"]


def test_metrics_cover_every_step_since_the_last_log(kit, whole):
    _, logs = run(kit, per_device_train_batch_size=8, logging_steps=3)
    counts = [8, 8, 6]  # the third step of an epoch has six pairs
    for name in ("rewards/margins", "logps/chosen"):
        expected = sum(n * entry[name] for n, entry in zip(counts, whole[1], strict=False)) / sum(counts)
        assert logs[0][name] == pytest.approx(expected, rel=1e-4)
    assert logs[0]["num_tokens"] == whole[1][2]["num_tokens"]
    assert logs[-1]["tokens_per_second"] > 0


def test_dropping_the_mask_changes_nothing(kit, monkeypatch):
    """Right padding under causal attention is invisible; the trainer passes no mask, here it does."""
    settings = {"per_device_train_batch_size": 8, "token_layout": "padded"}
    expected = run(kit, **settings)
    from fastalign.trainers import DPOTrainer

    original = DPOTrainer.batch_loss

    def masked(self, model, batch, num_items):
        def call(input_ids, head_fn):
            return model(input_ids=input_ids, attention_mask=batch["attention_mask"], head_fn=head_fn)

        return original(self, call, batch, num_items)

    monkeypatch.setattr(DPOTrainer, "batch_loss", masked)
    kit.assert_same(run(kit, **settings)[0], expected[0], **EXACT)


def test_two_processes_give_what_one_gives(kit, start, tmp_path):
    """Weights, logged metrics and an evaluation whose last batch is filled up with pairs that do not count."""
    settings = {
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", "backend": "torch",
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "micro_batch_tokens": 64,
    }  # fmt: skip
    folder = tmp_path / "two"
    folder.mkdir()
    workers = start(Path(__file__).with_name("worker.py"), folder, json.dumps(settings))
    one = kit.trainer(
        kit.model().double(), kit.pairs(24), kit.pairs(7, seed=1), **(settings | {"per_device_train_batch_size": 8})
    )
    one.train()
    metrics = one.evaluate()
    workers.wait()
    two = torch.load(folder / "result.pt")
    kit.assert_same(two["weights"], kit.weights(one), **EXACT)
    for a, b in zip(two["logs"], kit.logs(one), strict=True):
        for name in (*METRICS, "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/margins_se", "eval_logps/chosen"):
        assert two["eval"][name] == pytest.approx(metrics[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("size", [1, 3, 7, 16])
def test_evaluation_does_not_depend_on_its_batches(kit, size):
    policy = kit.model()
    trainer = kit.trainer(
        policy, kit.pairs(4), kit.pairs(7, seed=1), ref_model=kit.model(seed=5), per_device_eval_batch_size=size
    )
    got = trainer.evaluate()
    values = margins_and_losses(trainer, trainer.eval_dataset)
    margin = torch.tensor([m for m, _ in values], dtype=torch.float64)
    assert got["eval_loss"] == pytest.approx(sum(loss for _, loss in values) / 7, rel=1e-5)
    assert got["eval_rewards/margins"] == pytest.approx(float(margin.mean()), rel=1e-4)
    assert got["eval_rewards/accuracies"] == pytest.approx(float((margin > 0).double().mean()))
    assert got["eval_rewards/margins_se"] == pytest.approx(float(margin.std()) / math.sqrt(7), rel=1e-4)


def margins_and_losses(trainer, dataset):
    """(margin, loss) of each pair through the model's own logits, from the definition."""
    found = []
    for example in dataset:
        rewards = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*example["prompt_ids"], *example[f"{side}_ids"]]])
            start = len(example["prompt_ids"])
            with torch.no_grad():
                logps = trainer.model.eval()(input_ids=ids).logits.double().log_softmax(-1)[0, start - 1 : -1]
            picked = logps.gather(1, ids[0, start:, None]).sum()
            rewards.append(trainer.args.beta * (picked - float(example[f"ref_{side}_logps"].sum(dtype="float64"))))
        margin = float(rewards[0] - rewards[1])
        found.append((margin, math.log1p(math.exp(-margin))))
    return found


class SyncCounter(TorchDispatchMode):
    """Records who reads a tensor's value on the host."""

    def __init__(self):
        super().__init__()
        self.readers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            self.readers.append(frames[-2])
        return func(*args, **(kwargs or {}))


def test_a_step_reads_no_tensor_on_the_host(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(8), micro_batch_tokens=80, max_steps=1)
    trainer.train()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(8)]))
    with SyncCounter() as counter:
        trainer.training_step(trainer.model, batch, 8)
    assert (
        counter.readers
    )  # the head looks at host tensors (cu_seqlens, targets' range on the CPU), so the counter works
    folders = ("/fastalign/trainers/", "/fastalign/models/")
    assert not [f"{f.filename}:{f.lineno}" for f in counter.readers if any(name in f.filename for name in folders)]


def test_nan_loss_is_shown(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(4), max_steps=1, learning_rate=1.0, on_bad_step="ignore")
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    trainer._starts_at_reference = False  # the check before training would stop it
    trainer.train()
    assert math.isnan(kit.logs(trainer)[0]["loss"])


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "random"])
def test_sampling_strategies(kit, strategy):
    trainer = kit.trainer(kit.model(), kit.pairs(24), train_sampling_strategy=strategy, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 6


def test_loader_workers(kit):
    expected = run(kit, n=8, num_train_epochs=1)
    got = run(kit, n=8, num_train_epochs=1, dataloader_num_workers=2)
    kit.assert_same(got[0], expected[0], rtol=0, atol=0)


def test_the_best_model_is_loaded_at_the_end(kit):
    trainer = kit.trainer(
        kit.model(), kit.pairs(16), kit.pairs(8, seed=1), num_train_epochs=3, learning_rate=0.3, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_rewards/accuracies",
        eval_on_start=True,
    )  # fmt: skip
    trainer.train()
    found = [entry["eval_rewards/accuracies"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_rewards/accuracies"] == max(found[1:])  # the first is before any checkpoint


def test_predictions_are_refused(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(4))
    with pytest.raises(ValueError, match="no logits"):
        trainer.predict(trainer.train_dataset)


def test_tensorboard_gets_the_metrics(kit):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(kit.folder / "runs"))
        run(kit, n=8, report_to="tensorboard", num_train_epochs=1)
    events = EventAccumulator(str(kit.folder / "runs"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/rewards/margins", "train/length/chosen", "train/tokens_per_second"} <= set(tags)
