"""TRL's own trainers with and without fastalign: the same losses, metrics and weights.

TRL is no dependency, so these skip in the project's environment. Run them where TRL, pytest, pytest-timeout and
hypothesis are installed beside fastalign:

    <python with trl> -P -m pytest tests/integrations/test_trl.py -m peers
"""

import math
import sys

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig

from fastalign.integrations import patch_trl

trl = pytest.importorskip("trl", reason="TRL lives in an environment of its own: see the head of this file")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
torch.set_num_threads(1)

VOCAB = 97
WORDS = [f"w{i}" for i in range(3, VOCAB)]
DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "softcap": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, final_logit_softcapping=3.0)),
    "scale": lambda: tf.CohereForCausalLM(tf.CohereConfig(**DECODER, logit_scale=0.25)),
    "bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**{**DECODER, "num_key_value_heads": 4})),
    "moe": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01)
    ),
}


def make_model(family="llama", seed=0):
    torch.manual_seed(seed)
    return FAMILIES[family]()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words(generator, low, high):
    count = int(torch.randint(low, high, (), generator=generator))
    return "".join(f" {WORDS[i]}" for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())


def pairs(count=24):
    generator = torch.Generator().manual_seed(4)
    return Dataset.from_list(
        [{name: words(generator, 3, 14) for name in ("prompt", "chosen", "rejected")} for _ in range(count)]
    )


def arguments(config_class, folder, **settings):
    common = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False,
        "optim": "sgd",  # AdamW would blow up gradients that are zero but for rounding
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 0,
        "disable_tqdm": True,
    }  # fmt: skip
    return config_class(str(folder), **common | settings)


class Recorder(tf.TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(
            {name: value for name, value in logs.items() if "runtime" not in name and "second" not in name}
        )


def train(make_trainer, patched):
    """Logs, trained parameters and what they were."""
    torch.manual_seed(0)
    recorder = Recorder()
    trainer = make_trainer(recorder)
    initial = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    if patched:
        patch_trl(trainer)
    calls = []
    if patched:
        from fastalign.integrations import trl as ours

        original = ours.linear_logps
        ours.linear_logps = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    try:
        trainer.train()
        if trainer.eval_dataset is not None:
            trainer.evaluate()
    finally:
        if patched:
            ours.linear_logps = original
            assert calls, "nothing went through fastalign"
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return recorder.logs, trained, initial


def assert_same_run(make_trainer, *, tolerance=2e-5):
    logs, trained, initial = train(make_trainer, False)
    ours, ours_trained, _ = train(make_trainer, True)
    assert len(logs) == len(ours)
    compared = set()
    for step, (log, own) in enumerate(zip(logs, ours, strict=True)):
        assert log.keys() == own.keys()
        for name, value in log.items():
            if not isinstance(value, int | float) or name == "step_time":
                continue
            compared.add(name)
            if math.isnan(value):
                assert math.isnan(own[name])
                continue
            assert own[name] == pytest.approx(value, rel=tolerance, abs=tolerance), f"{name} of log {step}"
    for name, parameter in trained.items():
        torch.testing.assert_close(
            ours_trained[name], parameter, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    moved = max(float((trained[name] - start).abs().max()) for name, start in initial.items())
    assert moved > 4e-4, "the run trained nothing, so that it compares nothing"
    return compared


def dpo(tokenizer, folder, family="llama", peft=None, **settings):
    def make(recorder):
        reference = None if peft is not None or settings.get("precompute_ref_log_probs") else make_model(family, seed=1)
        return trl.DPOTrainer(
            model=make_model(family), ref_model=reference, args=arguments(trl.DPOConfig, folder, **settings),
            train_dataset=pairs(), eval_dataset=pairs(8), processing_class=tokenizer, callbacks=[recorder],
            peft_config=peft,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dpo_of_every_head(tokenizer, tmp_path, family):
    compared = assert_same_run(dpo(tokenizer, tmp_path, family))
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
def test_dpo_options_that_read_other_outputs(tokenizer, tmp_path, settings):
    assert_same_run(dpo(tokenizer, tmp_path, **settings))


def test_dpo_with_lora(tokenizer, tmp_path):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    assert_same_run(dpo(tokenizer, tmp_path, peft=adapter))


def test_dpo_in_bfloat16_stays_within_its_rounding(tokenizer, tmp_path):
    """TRL rounds logits to bfloat16, fastalign does not: close, not equal."""
    make = dpo(tokenizer, tmp_path, bf16=True, learning_rate=1e-4)
    logs, *_ = train(make, False)
    ours, *_ = train(make, True)
    for log, own in zip(logs, ours, strict=True):
        for name in {"logps/chosen", "entropy", "logits/chosen", "eval_logps/chosen"} & log.keys():
            assert own[name] == pytest.approx(log[name], rel=0.02, abs=0.02)


def reward_of(completions, **kwargs):
    return [sum(len(word) for word in text.split()) / 10 for text in completions]


def grpo(tokenizer, folder, **settings):
    def make(recorder):
        generator = torch.Generator().manual_seed(6)
        data = Dataset.from_list([{"prompt": words(generator, 3, 9)} for _ in range(32)])
        options = {
            "num_generations": 4, "max_completion_length": 10, "temperature": 0.8, "beta": 0.1, "learning_rate": 0.1,
            "per_device_train_batch_size": 8, "max_steps": 3,
        }  # fmt: skip
        return trl.GRPOTrainer(
            model=make_model(), reward_funcs=reward_of, args=arguments(trl.GRPOConfig, folder, **options | settings),
            train_dataset=data, processing_class=tokenizer, callbacks=[recorder],
        )  # fmt: skip

    return make


@pytest.fixture
def saved_model(tmp_path):
    """GRPO loads its reference from the name of the policy."""
    folder = tmp_path / "policy"
    make_model().save_pretrained(folder)
    return folder


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
def test_grpo(tokenizer, tmp_path, monkeypatch, saved_model, settings):
    def from_folder(family="llama", seed=0):
        return tf.AutoModelForCausalLM.from_pretrained(saved_model)

    monkeypatch.setattr(sys.modules[__name__], "make_model", from_folder)
    compared = assert_same_run(grpo(tokenizer, tmp_path, **settings))
    assert {"loss", "kl", "entropy", "reward", "clip_ratio/region_mean", "grad_norm"} <= compared


def test_grpo_with_a_head_in_float32(tokenizer, tmp_path, monkeypatch, saved_model):
    def in_bfloat16(family="llama", seed=0):
        return tf.AutoModelForCausalLM.from_pretrained(saved_model, dtype=torch.bfloat16)

    monkeypatch.setattr(sys.modules[__name__], "make_model", in_bfloat16)
    assert_same_run(
        grpo(tokenizer, tmp_path, cast_lm_head_to_fp32=True, beta=0.0, learning_rate=0.1, max_steps=2), tolerance=1e-3
    )


def test_kto(tokenizer, tmp_path):
    generator = torch.Generator().manual_seed(4)
    rows = [
        {"prompt": words(generator, 3, 9), "completion": words(generator, 3, 9), "label": bool(i % 2)}
        for i in range(24)
    ]

    def make(recorder):
        return trl.KTOTrainer(
            model=make_model(), ref_model=make_model(seed=1), args=arguments(trl.KTOConfig, tmp_path),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[recorder],
        )  # fmt: skip

    assert "kl" in assert_same_run(make)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(tokenizer, tmp_path, loss_type):
    generator = torch.Generator().manual_seed(4)
    rows = [{"prompt": words(generator, 3, 9), "completion": words(generator, 3, 9)} for _ in range(24)]

    def make(recorder):
        return trl.SFTTrainer(
            model=make_model(), args=arguments(trl.SFTConfig, tmp_path, loss_type=loss_type),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[recorder],
        )  # fmt: skip

    assert {"loss", "entropy", "mean_token_accuracy"} <= assert_same_run(make)


def test_undoing_and_patching_twice(tokenizer, tmp_path):
    trainer = dpo(tokenizer, tmp_path)(Recorder())
    before = [(dict(model.__dict__), model.forward) for model in (trainer.model, trainer.ref_model)]
    first = patch_trl(trainer)
    second = patch_trl(trainer)
    assert trainer.model.forward != before[0][1]
    second.remove()  # it found everything done
    assert trainer.model.forward != before[0][1]
    first.remove()
    for model, (attributes, forward) in zip((trainer.model, trainer.ref_model), before, strict=True):
        assert model.__dict__ == attributes
        assert model.forward == forward
    with patch_trl(trainer):
        assert trainer.ref_model.forward != before[1][1]
    assert trainer.ref_model.forward == before[1][1]


def test_generation_and_logits_are_untouched(tokenizer, tmp_path):
    trainer = dpo(tokenizer, tmp_path)(Recorder())
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    model = trainer.model.eval()
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    with patch_trl(trainer):
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), text)


def test_labels_shifted_beforehand(tokenizer, tmp_path):
    """As context parallelism passes them."""
    trainer = dpo(tokenizer, tmp_path)(Recorder())
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    shifted = ids.roll(-1, 1)
    shifted[:, :4] = shifted[0, -1] = -100
    call = {"input_ids": ids, "shift_labels": shifted, "fused_lm_head": True, "num_items_in_batch": 7}
    expected = trainer.model(**call)
    with patch_trl(trainer):
        found = trainer.model(**call)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_refusals_name_what_is_wrong(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"takes a TRL trainer, got LlamaForCausalLM; .*fastalign\.patch"):
        patch_trl(make_model())
    plain = tf.Trainer(make_model(), tf.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match=r"no fused head of TRL's.*TRL here is 1\."):
        patch_trl(plain)
    trainer = dpo(tokenizer, tmp_path)(Recorder())
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="DPOTrainer runs with fsdp"):
        patch_trl(trainer)
    monkeypatch.undo()
    monkeypatch.setattr(trainer.args, "torch_compile", True)
    with pytest.raises(ValueError, match="torch_compile=True"):
        patch_trl(trainer)


def test_another_fused_head_is_refused_by_version(tokenizer, tmp_path, monkeypatch):
    from trl.trainer import utils

    class Newer(utils.FusedCausalLMOutput):
        pass

    import dataclasses

    newer = dataclasses.make_dataclass("Newer", [("logit_variance", object, None)], bases=(Newer,))
    trainer = dpo(tokenizer, tmp_path)(Recorder())
    monkeypatch.setattr(utils, "FusedCausalLMOutput", newer)
    with pytest.raises(ValueError, match=r"another fused head.*logit_variance"):
        patch_trl(trainer)
    monkeypatch.undo()
    model = make_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "logit_variance"))
    trainer.model = model
    with pytest.raises(ValueError, match=r"asks for \['logit_variance'\]"):
        patch_trl(trainer)


def test_the_curve_that_trl_recorded_on_real_preferences(shared_dir, tmp_path):
    """50 steps of TRL's DPO on real pairs and a real checkpoint: loss to 1e-4, and the metrics."""
    import importlib.util
    import json
    from pathlib import Path

    repository = Path(__file__).parents[2]
    golden = json.loads((repository / "tests/trainers/golden/trl_dpo_curve.json").read_text())
    spec = importlib.util.spec_from_file_location("trl_dpo_curve", repository / "benchmarks/peers/trl_dpo_curve.py")
    curve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curve)
    model = shared_dir / "models" / golden["model"]
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    settings = golden["settings"]
    count = settings["max_steps"] * settings["per_device_train_batch_size"]
    rows, data = curve.select(str(shared_dir / "data" / golden["data"]), tokenizer, count, settings["max_length"])
    assert rows == golden["rows"]
    recorder = curve.Recorder()
    trainer = trl.DPOTrainer(
        model=tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl.DPOConfig(str(tmp_path), save_strategy="no", report_to="none", use_cpu=True, **settings),
        train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[recorder],
    )  # fmt: skip
    with patch_trl(trainer):
        trainer.train()
    for name, values in golden["logs"].items():
        found = torch.tensor([log[name] for log in recorder.logs], dtype=torch.float64)
        expected = torch.tensor(values, dtype=torch.float64)
        absolute = {"logps/chosen": 0.05, "logps/rejected": 0.05, "grad_norm": 0.01, "rewards/margins": 1e-3}
        torch.testing.assert_close(
            found, expected, rtol=0, atol=absolute.get(name, 1e-4), msg=lambda m, n=name: f"{n}: {m}"
        )
