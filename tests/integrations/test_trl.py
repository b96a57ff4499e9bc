"""TRL's own trainers with and without fastalign: the same losses, metrics and weights.

TRL is no dependency, so these skip in the project's environment. Run them where TRL, pytest, pytest-timeout and
hypothesis are installed beside fastalign:

    <python with trl> -P -m pytest tests/integrations tests/examples -m peers
"""

import json

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize("family", ["llama", "tied", "softcap", "scale", "bias", "moe"])
def test_dpo_of_every_head(kit, tmp_path, family):
    compared = kit.assert_same_run(kit.dpo(tmp_path, family))
    assert {
        "loss", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "rewards/margins", "grad_norm",
        "logps/chosen", "eval_loss", "eval_entropy",
    } <= compared  # fmt: skip
    assert ("aux_loss" in compared) == (family == "moe")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_weighting": True, "learning_rate": 1.0},  # the weights are small
        {"ld_alpha": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["ipo"]},
        {"precompute_ref_log_probs": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
    ],
    ids=lambda settings: next(iter(settings)) + str(next(iter(settings.values()))),
)
def test_dpo_options_that_read_other_outputs(kit, tmp_path, settings):
    kit.assert_same_run(kit.dpo(tmp_path, **settings))


def test_dpo_with_lora(kit, tmp_path):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    kit.assert_same_run(kit.dpo(tmp_path, peft=adapter))


@pytest.mark.timeout(1200)
def test_dpo_compiled(kit, tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    kit.assert_same_run(kit.dpo(tmp_path, learning_rate=0.1, **settings))


def test_dpo_in_bfloat16_stays_within_its_rounding(kit, tmp_path):
    """TRL rounds logits to bfloat16, fastalign does not: close, not equal."""
    make = kit.dpo(tmp_path, bf16=True, learning_rate=1e-4)
    logs, *_ = kit.train(make, False)
    ours, *_ = kit.train(make, True)
    for log, own in zip(logs, ours, strict=True):
        for name in {"logps/chosen", "entropy", "logits/chosen", "eval_logps/chosen"} & log.keys():
            assert own[name] == pytest.approx(log[name], rel=0.02, abs=0.02)


@pytest.fixture
def saved_model(kit, tmp_path):
    """GRPO loads its reference from the name of the policy."""
    kit.make_model().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2},
        {"entropy_coef": 0.01},
        {"loss_type": "dr_grpo"},
        {"importance_sampling_level": "sequence"},
    ],
    ids=["plain", "two_iterations", "entropy_bonus", "dr_grpo", "gspo"],
)
def test_grpo(kit, tmp_path, saved_model, settings):
    compared = kit.assert_same_run(kit.grpo(tmp_path, saved_model, **settings))
    assert {"loss", "kl", "entropy", "reward", "clip_ratio/region_mean", "grad_norm"} <= compared


def test_grpo_with_a_head_in_float32(kit, tmp_path, saved_model):
    make = kit.grpo(tmp_path, saved_model, dtype=torch.bfloat16, cast_lm_head_to_fp32=True, beta=0.0, max_steps=2)
    kit.assert_same_run(make, tolerance=1e-3)


def test_rloo(kit, tmp_path, saved_model):
    assert {"loss", "kl", "reward"} <= kit.assert_same_run(kit.rloo(tmp_path, saved_model))


def test_kto(kit, tmp_path):
    generator = torch.Generator().manual_seed(4)
    rows = [
        {name: kit.words(generator, 3, 9) for name in ("prompt", "completion")} | {"label": bool(i % 2)}
        for i in range(24)
    ]

    def make(recorder):
        return kit.trl.KTOTrainer(
            model=kit.make_model(), ref_model=kit.make_model(seed=1), args=kit.arguments(kit.trl.KTOConfig, tmp_path),
            train_dataset=Dataset.from_list(rows), processing_class=kit.make_tokenizer(), callbacks=[recorder],
        )  # fmt: skip

    assert "kl" in kit.assert_same_run(make)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(kit, tmp_path, loss_type):
    generator = torch.Generator().manual_seed(4)
    rows = [{name: kit.words(generator, 3, 9) for name in ("prompt", "completion")} for _ in range(24)]

    def make(recorder):
        return kit.trl.SFTTrainer(
            model=kit.make_model(), args=kit.arguments(kit.trl.SFTConfig, tmp_path, loss_type=loss_type),
            train_dataset=Dataset.from_list(rows), processing_class=kit.make_tokenizer(), callbacks=[recorder],
        )  # fmt: skip

    assert {"loss", "entropy", "mean_token_accuracy"} <= kit.assert_same_run(make)


@pytest.mark.timeout(1200)
def test_the_curve_that_trl_recorded_on_real_preferences(kit, shared_dir, repository, tmp_path):
    """50 steps of TRL's DPO on real pairs and a real checkpoint: loss to 1e-4, and the metrics."""
    golden = json.loads((repository / "tests/trainers/golden/trl_dpo_curve.json").read_text())
    curve = kit.load(repository / "benchmarks/peers/trl_dpo_curve.py")
    model = shared_dir / "models" / golden["model"]
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    settings = golden["settings"]
    count = settings["max_steps"] * settings["per_device_train_batch_size"]
    rows, data = curve.select(str(shared_dir / "data" / golden["data"]), tokenizer, count, settings["max_length"])
    assert rows == golden["rows"]
    recorder = curve.Recorder()
    trainer = kit.trl.DPOTrainer(
        model=tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=kit.trl.DPOConfig(str(tmp_path), save_strategy="no", report_to="none", use_cpu=True, **settings),
        train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[recorder],
    )  # fmt: skip
    with kit.patch_trl(trainer):
        trainer.train()
    wide = {"logps/chosen": 0.05, "logps/rejected": 0.05, "grad_norm": 0.01, "rewards/margins": 1e-3}
    for name, values in golden["logs"].items():
        found = torch.tensor([log[name] for log in recorder.logs], dtype=torch.float64)
        expected = torch.tensor(values, dtype=torch.float64)
        # at the start margins are 0 up to rounding, and wins a toss
        start = 1 if name == "rewards/accuracies" else 0
        torch.testing.assert_close(
            found[start:], expected[start:], rtol=0, atol=wide.get(name, 1e-4), msg=lambda m, n=name: f"{n}: {m}"
        )
