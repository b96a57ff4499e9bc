"""DPO in PyTorch Lightning: a LightningModule whose training step calls `linear_dpo_loss`.

    python examples/lightning_dpo.py [--steps 60]        (pip install lightning)

Lightning moves the tensors of a batch to the device; `rows`, which the head wants on the host, stays a numpy array.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import lightning
import torch
from shop import batches, build_model, build_tokenizer

from fastalign import LossOutput, linear_dpo_loss, patch, sequence_logps
from fastalign.models import Head, fuse_head


class PreferenceModule(lightning.LightningModule):
    def __init__(self, model: Any, beta: float = 0.3) -> None:
        super().__init__()
        # `model(..., head_fn=fn)` calls fn on the hidden states, inside the model's own forward
        self.model, self.beta = fuse_head(model), beta

    def step(self, batch: dict) -> LossOutput:
        def head_fn(hidden: torch.Tensor, head: Head) -> LossOutput:
            return linear_dpo_loss(
                hidden, head.weight, batch["targets"], ref_logps=batch["ref_logps"],
                rows=torch.from_numpy(batch["rows"]), beta=self.beta, **head.options,
            )  # fmt: skip

        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], head_fn=head_fn)

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        output = self.step(batch)
        if index % 10 == 0:
            print(f"step {index}: loss {output.loss:.4f}")
        return output.loss

    def validation_step(self, batch: dict, index: int) -> None:
        accuracy = self.step(batch).metrics["rewards/accuracies"].value
        self.log("accuracy", accuracy, batch_size=len(batch["targets"]) // 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def add_reference(model: Any, data: list[dict]) -> None:
    """The log-probs of the model as it is now, once for all batches."""
    with patch(model), torch.no_grad():
        for batch in data:
            scored = torch.nn.functional.pad(batch["targets"][:, :-1] >= 0, (1, 0))
            batch["ref_logps"] = sequence_logps(model.logps(batch["input_ids"], scored, batch["attention_mask"]).logps)


def loader(data: list[dict]) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(data, batch_size=None, collate_fn=lambda batch: batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    data = batches(tokenizer, steps + 1)
    add_reference(model, data)
    *training, held_out = data
    warnings.filterwarnings("ignore", module="lightning")
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = PreferenceModule(model)
    trainer.fit(module, loader(training))
    (found,) = trainer.validate(module, loader([held_out]), verbose=False)
    print(f"held-out accuracy {found['accuracy']:.3f}")


if __name__ == "__main__":
    main()
