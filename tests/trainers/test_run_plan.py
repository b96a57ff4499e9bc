"""From configs of trainers to plans: data, heaviest batches, settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalign.trainers import DPOConfig, PPOConfig, PROConfig, RewardConfig, SFTConfig
from fastalign.trainers.batches import computed_tokens, split_batch
from fastalign.trainers.run_plan import run_plan

SIZES = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 0,
    "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> str:
    """A model of which there is config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return str(tmp_path)


def settings(config_class, folder: str, **given):
    given = {"use_cpu": True, "report_to": "none", "gradient_checkpointing": False} | given
    return config_class(output_dir=str(Path(folder) / "out"), model_name_or_path=folder, **given)


@pytest.mark.parametrize("config_class", [DPOConfig, SFTConfig, RewardConfig, PROConfig])
def test_every_trainer_has_a_plan_from_config_json_alone(config_class, folder):
    plan = run_plan(settings(config_class, folder), tokens=32).plan()
    assert plan.layout == "shared"
    assert plan.trainable == plan.parameters > 0
    assert plan.parts["weights"] == pytest.approx(4 * plan.parameters, rel=0.01)
    sequences = {DPOConfig: 16, SFTConfig: 8, RewardConfig: 16, PROConfig: 32}[config_class]
    assert plan.tokens["real"] == sequences * 32
    assert (plan.flops["head"] == 0) == (config_class is RewardConfig)
    assert (
        plan.tokens["scored"]
        == {DPOConfig: 16 * 16, SFTConfig: 8 * 31, RewardConfig: 16, PROConfig: 32 * 16}[config_class]
    )


def test_losses_on_single_responses_and_coupled_ones(folder):
    for loss_type in ("kto", "aot"):
        made = run_plan(settings(DPOConfig, folder, loss_type=loss_type), tokens=32)
        assert made.head.streamed == (loss_type == "kto")
        assert made.plan().passes == 1


def test_accumulation_repeats_the_passes(folder):
    once, twice = (
        run_plan(settings(DPOConfig, folder, gradient_accumulation_steps=n, micro_batch_tokens=100), tokens=32).plan()
        for n in (1, 2)
    )
    assert twice.passes == 2 * once.passes > 2
    assert twice.total_flops == pytest.approx(2 * once.total_flops)


def test_settings_that_change_memory(folder):
    plain = run_plan(settings(DPOConfig, folder, token_layout="padded"), tokens=64).plan()
    lora = run_plan(settings(DPOConfig, folder, use_peft=True), tokens=64)
    live = run_plan(settings(DPOConfig, folder, precompute_ref_log_probs=False), tokens=64).plan()
    assert plain.layout == "padded"
    assert plain.tokens["computed"] == plain.tokens["padded"]
    assert lora.model.dtype == torch.bfloat16
    assert lora.plan().parts["adapter"] == 4 * lora.plan().trainable
    assert "libraries" in lora.plan().parts
    assert live.parts["reference"] == 4 * live.parameters
    assert "reference" not in plain.parts
    pure = run_plan(settings(DPOConfig, folder, dtype="bfloat16"), tokens=64).plan()
    assert pure.parts["weights"] < 0.6 * plain.parts["weights"]


def test_the_heaviest_batch_fills_a_pass(folder):
    made = run_plan(settings(SFTConfig, folder, per_device_train_batch_size=6), tokens=32)
    made.__dict__["sizes"] = np.array([90, 70, 50, 50, 33, 10, 10, 10])
    assert made.heaviest(100).tolist() == [2, 3, 2, 3, 2, 3]
    assert made.heaviest(95).tolist() == [0] * 6
    assert made.heaviest(110).tolist() == [0, 5, 6] * 2, "50 + 50 leave room"
    assert made.heaviest(60).tolist() == [0] * 6, "one that is larger than a pass is a pass of its own"
    assert made.heaviest(0).tolist() == [0, 1, 2, 3, 4, 5]


def test_lengths_of_real_data_are_measured(shared_dir, tmp_path):
    model, data = shared_dir / "models/hh-tiny", shared_dir / "data/hh_harmless.jsonl.gz"
    args = settings(
        DPOConfig, str(model), dataset_name=str(data), max_samples=200, on_bad_row="skip", max_length=512,
    )  # fmt: skip
    args.output_dir = str(tmp_path)
    made = run_plan(args)
    assert len(made.sizes) > 150
    limit = 1024
    pieces = split_batch(made.batch(limit), limit, layout="shared")
    fill = computed_tokens(pieces[0], "shared")
    assert 0.9 * limit < fill <= limit
    assert len(pieces) > 1


def test_auto_sizing_stays_within_the_budget(folder):
    made = run_plan(settings(DPOConfig, folder), tokens=256)
    small, large = made.plan(256).peak_bytes, made.plan(4096).peak_bytes
    choice, plan = made.auto((small + large) / 2 / 2**30)
    assert 256 <= choice < 4096
    assert plan.peak_bytes <= (small + large) / 2
    assert made.plan(choice * 2).peak_bytes > (small + large) / 2
    with pytest.raises(ValueError, match="memory_gb is missing"):
        made.auto()


def test_budgets_of_tokens_have_the_heaviest_batch_that_they_allow(folder):
    """A batch of at most so many computed tokens, as `TokenBatches` makes them, in passes as full as they can be."""
    made = run_plan(settings(SFTConfig, folder, max_tokens_per_batch=300), tokens=32)
    made.__dict__["sizes"] = np.array([90, 70, 50, 50, 33, 10, 10, 10])
    assert made.heaviest(100).tolist() == [2, 3] * 3
    assert made.heaviest(90).tolist() == [0, 0, 0]
    assert made.heaviest(0).tolist() == made.heaviest(1000).tolist() == [0, 1, 2, 3, 4], "one pass of 293 tokens"
    real = run_plan(settings(DPOConfig, folder, max_tokens_per_batch=1000, micro_batch_tokens=400), tokens=64)
    plan = real.plan()
    assert 900 < plan.tokens["computed"] <= 1000
    assert 300 < plan.pass_tokens <= 400
    _, sized = real.auto(memory_gb=1)
    assert sized.micro_batch_tokens == 1024
    assert sized.passes == 1


def test_what_cannot_be_planned_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"dataset_name is missing|tokenizer"):
        run_plan(settings(DPOConfig, folder))
    with pytest.raises(ValueError, match="tokens=3"):
        run_plan(settings(DPOConfig, folder), tokens=3)
    with pytest.raises(ValueError, match="tokens=32: no room for a prompt beside response_length=32"):
        run_plan(settings(PPOConfig, folder, response_length=32), tokens=32)
    for given, word in (({"policy_loss": "trpo"}, "policy_loss='trpo'"), ({"use_vllm": True}, "use_vllm=True")):
        with pytest.raises(ValueError, match=f"{word} cannot be planned"):
            run_plan(settings(PPOConfig, folder, **given), tokens=256)
