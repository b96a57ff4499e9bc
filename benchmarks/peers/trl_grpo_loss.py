"""TRL's GRPO losses, importance weights and advantages on fixed log-probs, as JSON.

    <python with trl> benchmarks/peers/trl_grpo_loss.py --output trl_grpo_loss.json

Runs in an environment of its own (TRL is no dependency of fastalign). The trainer is TRL's, and what it computes is
computed by its `_generate_and_score_completions` and `_compute_loss`; only sampling and the model's forward are
replaced, by completions and log-probs drawn from a seed, which stand in the file. float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

PROMPTS, GENERATIONS, LONGEST, VOCABULARY = 2, 4, 6, 32
OLD, NEW, REFERENCE, SAMPLER = "old_logps", "logps", "ref_logps", "sampler_logps"

# name -> attributes of the trainer. `args.*` stand in its config.
CASES: dict[str, dict[str, object]] = {
    "grpo": {"loss_type": "grpo"},
    "grpo, KL": {"loss_type": "grpo", "beta": 0.04},
    "grpo, dual clip": {"loss_type": "grpo", "args.delta": 1.5},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "cispo, KL": {"loss_type": "cispo", "epsilon_high": 1.3, "beta": 0.04},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06},
    "cispo, sequence": {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.05},
} | {
    f"dapo, {mode}": {"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_mode": mode}
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
} | {
    "gspo, token_truncate": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.06,
        "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate",
    },
    "cispo, sequence_truncate": {
        "loss_type": "cispo", "epsilon_high": 1.3, "use_vllm": True,
        "vllm_importance_sampling_mode": "sequence_truncate",
    },
    "unscaled": {"loss_type": "dr_grpo", "scale_rewards": "none"},
}  # fmt: skip
CAP = 1.5


def fixed_inputs() -> dict[str, object]:
    g = torch.Generator().manual_seed(0)
    count = PROMPTS * GENERATIONS
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=g)
    lengths[0] = LONGEST
    old = -3 * torch.rand(count, LONGEST, generator=g)
    noise = torch.randn(4, count, LONGEST, generator=g)
    return {
        "lengths": lengths, OLD: old, NEW: old + 0.2 * noise[0] + 0.1 * noise[3][:, :1],
        REFERENCE: old + 0.3 * noise[1], SAMPLER: old + 0.3 * noise[2], "rewards": torch.randn(count, generator=g),
    }  # fmt: skip


def tiny_trainer(folder: str, inputs: dict[str, torch.Tensor]):
    import trl

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/model")  # TRL loads the reference by name
    count = PROMPTS * GENERATIONS
    args = trl.GRPOConfig(
        folder, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=count,
        gradient_accumulation_steps=1, num_generations=GENERATIONS, max_completion_length=LONGEST, beta=0.04,
        use_bias_correction_kl=False,
        vllm_importance_sampling_clip_max=CAP, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        f"{folder}/model",
        lambda completions, **columns: inputs["rewards"].tolist(),
        args,
        Dataset.from_list([{"prompt": f"w{i} w9"} for i in range(2, 10)]),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def measure(trainer, case: dict[str, object], inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    """Loss, its gradient with respect to log-probs, and what TRL logs of one case."""
    defaults = {
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token", "use_vllm": False,
        "scale_rewards": "group", "args.delta": None, "vllm_importance_sampling_mode": "token_truncate",
    }  # fmt: skip
    for name, value in (defaults | case).items():
        owner = trainer.args if name.startswith("args.") else trainer
        setattr(owner, name.removeprefix("args."), value)
    trainer._metrics["train"].clear()
    ids = [[5] * int(n) for n in inputs["lengths"]]
    sampled = [row[: len(own)].tolist() for row, own in zip(inputs[SAMPLER], ids, strict=True)]

    def generate(prompts):
        completions = [f"w{len(own)}" for own in ids]
        return [[3, 4]] * len(ids), ids, None, completions, sampled if trainer.use_vllm else None, {}, None, None

    current = [inputs[OLD]]
    trainer._generate = generate
    trainer._get_per_token_logps_and_entropies = lambda model, *args, **kwargs: (
        inputs[REFERENCE] if model is trainer.ref_model else current[0],
        torch.zeros_like(inputs[OLD]),
        None,
    )
    given = [{"prompt": f"w{2 + i} w9"} for i in range(PROMPTS) for _ in range(GENERATIONS)]
    batch = trainer._generate_and_score_completions(given)
    batch["old_per_token_logps"] = inputs[OLD]  # TRL leaves them out where its own two steps make them equal
    leaf = inputs[NEW].clone().requires_grad_()
    current[0] = leaf
    loss = trainer._compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    kept = ("clip_ratio/", "cispo_clip_ratio", "kl", "sampling/importance_sampling_ratio/", "frac_reward_zero_std")
    return {
        "settings": case, "loss": float(loss.detach()), "gradient": rows(gradient, inputs["lengths"]),
        "advantages": batch["advantages"].tolist(),
        "logged": {name: value for name, value in logged.items() if name.startswith(kept)},
    }  # fmt: skip


def rows(values: torch.Tensor, lengths: torch.Tensor) -> list[list[float]]:
    """One row per completion, without what lies beyond its end."""
    return [row[:n].tolist() for row, n in zip(values, lengths.tolist(), strict=True)]


def main() -> None:
    import trl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    inputs = fixed_inputs()
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_trainer(folder, inputs)
        cases = {name: measure(trainer, case, inputs) for name, case in CASES.items()}
    record = {
        "provenance": {
            "script": "benchmarks/peers/trl_grpo_loss.py", "trl": trl.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(), "device": "cpu, float32",
        },
        "num_generations": GENERATIONS, "max_completion_length": LONGEST, "sampler_cap": CAP,
        "inputs": {
            name: values.tolist() if values.dim() == 1 else rows(values, inputs["lengths"])
            for name, values in inputs.items()
        },
        "cases": cases,
    }  # fmt: skip
    with open(options.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(rounded(record)).replace('}, "', '},\n"') + "\n")


def rounded(value: object) -> object:
    """Floats with nine significant digits, which a float32 has no more of."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
