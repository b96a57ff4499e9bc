"""LoRA with PEFT: an adapter in the backbone under a frozen head, or on the head itself, tied embeddings or not.

    python examples/lora.py [--on_head] [--tied] [--steps 60]

The reference is the model with its adapter off, so nothing is loaded twice. With a frozen head `linear_logps` makes no
gradient for the weight: two GEMMs instead of three or four. An adapter on the head, W + s·B·A, widens the hidden states
by its rank; the sum is never built, and W gets no gradient either.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from shop import batches, build_model, build_tokenizer

from fastalign import linear_dpo_loss, patch, sequence_logps
from fastalign.models import Head, fuse_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--on_head", action="store_true", help="put an adapter on the head too")
    parser.add_argument("--tied", action="store_true", help="the head's weight is the embedding's")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    base = build_model(tokenizer, seed=0)
    if options.tied:
        base.lm_head.weight = base.model.embed_tokens.weight
        base.config.tie_word_embeddings = True
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    targets += ["lm_head"] if options.on_head else []
    model = fuse_head(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets)))
    *training, held_out = batches(tokenizer, options.steps + 1)

    def loss_of(batch: dict) -> object:
        scored = torch.nn.functional.pad(batch["targets"][:, :-1] >= 0, (1, 0))
        with torch.no_grad(), model.disable_adapter(), patch(model):  # the reference
            ref_logps = sequence_logps(model.logps(batch["input_ids"], scored, batch["attention_mask"]).logps)

        def head_fn(hidden: torch.Tensor, head: Head) -> object:
            return linear_dpo_loss(
                hidden, head.weight, batch["targets"], ref_logps=ref_logps, rows=torch.from_numpy(batch["rows"]),
                beta=0.3, **head.options,
            )  # fmt: skip

        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], head_fn=head_fn)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = base.model.embed_tokens.weight.detach().clone()
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    for step, batch in enumerate(training):
        output = loss_of(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {output.loss:.4f}, margin {output.metrics['rewards/margins'].value:.3f}")
    with torch.no_grad():
        print(f"held-out accuracy {loss_of(held_out).metrics['rewards/accuracies'].value:.3f}")
    assert torch.equal(base.model.embed_tokens.weight, frozen)


if __name__ == "__main__":
    main()
