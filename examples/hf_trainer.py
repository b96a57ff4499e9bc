"""DPO in a subclass of Hugging Face's Trainer: `fastalign.patch` gives the model `logps`, and a loss is a few lines.

    python examples/hf_trainer.py [--steps 60]

`fastalign.DPOTrainer` does all of this and more; here is what one's own Trainer needs. The call goes through the model
that Trainer hands to `compute_loss`, so DistributedDataParallel and mixed precision work as usual.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from shop import build_model, build_tokenizer, token_pairs
from transformers import Trainer, TrainingArguments

import fastalign
from fastalign.data import PreferenceCollator
from fastalign.losses import dpo_loss


class PreferenceTrainer(Trainer):
    """Batches are PreferenceCollator's, with ref_logps (2P,)."""

    beta = 0.3

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        fastalign.patch(model)  # once: a model that has it is left as it is
        chosen, rejected = sequence_logps(model, inputs).chunk(2)
        ref_chosen, ref_rejected = inputs["ref_logps"].chunk(2)
        output = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=self.beta)
        self.accuracy = output.metrics["rewards/accuracies"].value
        return (output.loss, {}) if return_outputs else output.loss


def sequence_logps(model: Any, batch: dict) -> torch.Tensor:
    """(2P,) log-prob of each response."""
    completion_mask = torch.zeros_like(batch["attention_mask"])
    completion_mask[:, 1:] = batch["targets"][:, :-1] != fastalign.IGNORE_INDEX
    return fastalign.sequence_logps(model.logps(batch["input_ids"], completion_mask, batch["attention_mask"]).logps)


class Collator(PreferenceCollator):
    """Hands over tensors alone: Trainer's default moves whatever is in a batch."""

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        names = ("input_ids", "attention_mask", "targets", "ref_logps")
        return {name: batch[name] for name in names if name in batch}


def with_reference(model: Any, tokenizer: Any, pairs: list[dict]) -> list[dict]:
    """The pairs with the log-probs of the model as it is now, per token."""
    collate = Collator(tokenizer.pad_token_id)
    with fastalign.patch(model), torch.no_grad():
        for start in range(0, len(pairs), 64):
            chunk = pairs[start : start + 64]
            batch = collate(chunk)
            mask = batch["targets"] != fastalign.IGNORE_INDEX
            completion_mask = torch.nn.functional.pad(mask[:, :-1], (1, 0))
            scored = model.logps(batch["input_ids"], completion_mask, batch["attention_mask"]).logps
            for i, values in enumerate(scored):
                side = "chosen" if i < len(chunk) else "rejected"
                chunk[i % len(chunk)][f"ref_{side}_logps"] = values[mask[i, :-1]].tolist()
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    pairs = with_reference(model, tokenizer, token_pairs(tokenizer, 16 * steps + 32))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=16, max_steps=steps, learning_rate=2e-3, lr_scheduler_type="constant",
            logging_steps=10, logging_first_step=True, save_strategy="no", report_to="none", use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = PreferenceTrainer(
            model=model,
            args=arguments,
            train_dataset=pairs[32:],
            eval_dataset=pairs[:32],
            data_collator=Collator(tokenizer.pad_token_id),
        )
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}")
    with torch.no_grad():
        trainer.compute_loss(model.eval(), trainer.data_collator(pairs[:32]))
    print(f"held-out accuracy {trainer.accuracy:.3f}")


if __name__ == "__main__":
    main()
