"""torch.compile of a DPO step: backbone, head, log-probs and loss as one graph, without a break.

    python examples/compile_step.py [--steps 20] [--backend inductor]

fullgraph=True would raise at a graph break. The backward is compiled with it, the optimizer's step by itself. Batches
are padded to one length, as static shapes compile once.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from shop import batches, build_model, build_tokenizer

from fastalign import patch, sequence_logps
from fastalign.losses import dpo_loss

LENGTH = 48


def inputs(batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, completion_mask, attention_mask, each (2P, LENGTH)."""
    scored = torch.nn.functional.pad(batch["targets"][:, :-1] >= 0, (1, 0))
    tensors = (batch["input_ids"], scored, batch["attention_mask"])
    ids, scored, mask = (torch.nn.functional.pad(t, (0, LENGTH - t.shape[1])) for t in tensors)
    return ids, scored, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager needs no C++ compiler")
    options = parser.parse_args()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    patch(model)

    def loss_of(ids: torch.Tensor, scored: torch.Tensor, mask: torch.Tensor, ref_logps: torch.Tensor) -> Any:
        chosen, rejected = sequence_logps(model.logps(ids, scored, mask).logps).chunk(2)
        output = dpo_loss(chosen, rejected, *ref_logps.chunk(2), beta=0.3)
        return output.loss, output.metrics["rewards/margins"].value

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=True)
    compiled_loss = torch.compile(loss_of, fullgraph=True, dynamic=False, backend=options.backend)
    compiled_update = torch.compile(optimizer.step, backend=options.backend)
    prepared = [inputs(batch) for batch in batches(tokenizer, options.steps)]
    with torch.no_grad():
        references = [sequence_logps(model.logps(*batch).logps) for batch in prepared]
    for step, (batch, ref_logps) in enumerate(zip(prepared, references, strict=True)):
        loss, margin = compiled_loss(*batch, ref_logps)
        if step == 0:
            plain, _ = loss_of(*batch, ref_logps)
            print(f"compiled loss {loss:.6f}, plain {plain:.6f}")
        loss.backward()
        compiled_update()
        optimizer.zero_grad()
    print(f"step {step}: loss {loss:.4f}, margin {margin:.3f}")


if __name__ == "__main__":
    main()
