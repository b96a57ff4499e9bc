"""DPO in a plain PyTorch loop: the backbone's hidden states and the head's weight go into `linear_dpo_loss`.

    python examples/pytorch_loop.py [--steps 60]

The logits of a batch, (sequences, tokens, vocabulary), never exist; the loss and its gradients are made tile by tile.
"""

from __future__ import annotations

import argparse

import torch
from shop import batches, build_model, build_tokenizer

import fastalign


def reference_logps(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """(2P,) the reference's log-prob of each response. Computed once: the reference need not stay in memory."""
    with torch.no_grad():
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        scored = fastalign.linear_logps(hidden, model.lm_head.weight, batch["targets"])
    return fastalign.sequence_logps(scored.logps)


def loss_of(model: torch.nn.Module, batch: dict) -> fastalign.LossOutput:
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return fastalign.linear_dpo_loss(
        hidden,
        model.lm_head.weight,
        batch["targets"],
        ref_logps=batch["ref_logps"],
        rows=torch.from_numpy(batch["rows"]),  # which tokens count, known on the host: no synchronisation on a GPU
        beta=0.3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    *training, held_out = batches(tokenizer, steps + 1)
    for batch in (*training, held_out):
        batch["ref_logps"] = reference_logps(model, batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step, batch in enumerate(training):
        output = loss_of(model, batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {output.loss:.4f}, margin {output.metrics['rewards/margins'].value:.3f}")
    with torch.no_grad():
        accuracy = loss_of(model, held_out).metrics["rewards/accuracies"].value
    print(f"held-out accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
