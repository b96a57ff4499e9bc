"""What the tests on TRL's trainers share: tiny models, data, and two runs that must be equal. Needs TRL."""

import math

import pytest
import torch
import transformers as tf
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from fastalign.integrations import patch_trl
from fastalign.integrations import trl as integration

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


def make_tokenizer():
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
    calls, original = [], integration.linear_logps
    integration.linear_logps = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    try:
        trainer.train()
        if trainer.eval_dataset is not None:
            trainer.evaluate()
    finally:
        integration.linear_logps = original
    assert bool(calls) == patched, "which log-probs were used is not what was asked for"
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


def dpo(folder, family="llama", peft=None, **settings):
    def make(recorder):
        reference = None if peft is not None or settings.get("precompute_ref_log_probs") else make_model(family, seed=1)
        return trl.DPOTrainer(
            model=make_model(family), ref_model=reference, args=arguments(trl.DPOConfig, folder, **settings),
            train_dataset=pairs(), eval_dataset=pairs(8), processing_class=make_tokenizer(), callbacks=[recorder],
            peft_config=peft,
        )  # fmt: skip

    return make


def reward_of(completions, **kwargs):
    return [sum(len(word) for word in text.split()) / 10 for text in completions]


def grpo(folder, model, dtype=torch.float32, **settings):
    def make(recorder):
        generator = torch.Generator().manual_seed(6)
        data = Dataset.from_list([{"prompt": words(generator, 3, 9)} for _ in range(32)])
        options = {
            "num_generations": 4, "max_completion_length": 10, "temperature": 0.8, "beta": 0.1, "learning_rate": 0.1,
            "per_device_train_batch_size": 8, "max_steps": 3,
        }  # fmt: skip
        return trl.GRPOTrainer(
            model=tf.AutoModelForCausalLM.from_pretrained(model, dtype=dtype), reward_funcs=reward_of,
            args=arguments(trl.GRPOConfig, folder, **options | settings), train_dataset=data,
            processing_class=make_tokenizer(), callbacks=[recorder],
        )  # fmt: skip

    return make


def rloo(folder, model, **settings):
    def make(recorder):
        generator = torch.Generator().manual_seed(6)
        data = Dataset.from_list([{"prompt": words(generator, 3, 9)} for _ in range(32)])
        options = {
            "num_generations": 4, "max_completion_length": 10, "beta": 0.05, "learning_rate": 0.1,
            "per_device_train_batch_size": 8, "max_steps": 2,
        }  # fmt: skip
        return trl.RLOOTrainer(
            model=tf.AutoModelForCausalLM.from_pretrained(model), reward_funcs=reward_of,
            args=arguments(trl.RLOOConfig, folder, **options | settings), train_dataset=data,
            processing_class=make_tokenizer(), callbacks=[recorder],
        )  # fmt: skip

    return make
