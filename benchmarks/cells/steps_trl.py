"""TRL's side of `steps`: the losses of its trainers, on a model and an optimizer of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def prepare(
    task: str, name: str, batch: dict[str, Any], device: str, dtype: torch.dtype, parameters: float
) -> tuple[Callable[[], Tensor], Any, Any]:
    """(loss(), model, optimizer).

    Raises ModuleNotFoundError without TRL, RuntimeError where a second model does not fit.
    """
    import trl  # noqa: F401

    from cells.steps import make_model, make_optimizer

    if device == "cuda" and (free := torch.cuda.mem_get_info()[0]) < 12 * parameters:  # with gradients and AdamW's
        raise RuntimeError(f"a second model takes {12 * parameters / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    torch.manual_seed(0)  # the weights of the first one
    model = make_model(name, device, dtype)
    made = {"dpo": _dpo_trainer, "ppo": _grpo_trainer}[task](model, device)
    made.current_gradient_accumulation_steps = 1
    model = made.model
    given = _dpo_batch(batch) if task == "dpo" else _grpo_batch(batch)
    return lambda: made.compute_loss(model, dict(given)), model, make_optimizer(model)


def _tokenizer() -> Any:
    """Knows two words; no text is tokenised."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="a"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def _common(device: str) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": device == "cpu", "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "per_device_train_batch_size": 2,
    }  # fmt: skip


def _dpo_trainer(model: Any, device: str) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "a b", "chosen": "a", "rejected": "b"}] * 2
    arguments = DPOConfig(**_common(device), precompute_ref_log_probs=True, beta=0.1)
    return DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
    )  # fmt: skip


def _grpo_trainer(model: Any, device: str) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(**_common(device), num_generations=2, beta=0.0, loss_type="dapo", max_completion_length=8)
    data = Dataset.from_list([{"prompt": "a b"}] * 2)
    return GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=data, processing_class=_tokenizer(),
    )  # fmt: skip


def _dpo_batch(batch: dict[str, Any]) -> dict[str, Any]:
    mask = batch["attention_mask"].clone()
    mask[:, : batch["prompt"]] = 0
    chosen, rejected = batch["ref_logps"].chunk(2)
    return {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "completion_mask": mask,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip


def _grpo_batch(batch: dict[str, Any]) -> dict[str, Any]:
    ids, mask, prompt = batch["input_ids"], batch["attention_mask"], batch["prompt"]
    counts = batch["targets"][:, prompt - 1 : -1] != -100
    old = torch.zeros(counts.shape, device=ids.device)
    old[counts] = batch["old_logps"]
    first = torch.from_numpy(batch["cu_seqlens"][:-1].astype("int64")).to(ids.device)
    return {
        "prompt_ids": ids[:, :prompt], "prompt_mask": mask[:, :prompt], "completion_ids": ids[:, prompt:],
        "completion_mask": mask[:, prompt:], "advantages": batch["advantages"][first], "old_per_token_logps": old,
        "num_items_in_batch": counts.sum(),
    }  # fmt: skip
