"""Losses that TRL's DPOTrainer does not have, as TRL and Liger compute them on real pairs, as JSON.

    <python with trl and liger> benchmarks/peers/preference_losses.py --golden trl_dpo.json --models folder \
        --output tests/losses/golden/peers_preference.json

Runs in an environment of its own (neither is a dependency of fastalign). The pairs are those of TRL's DPO figures
(`--golden`: token ids and masks, chosen responses first), the models `hh-tiny-dpo` (policy) and `hh-tiny` (reference)
in `--models`. TRL's part calls the trainers' own loss methods (KTOTrainer; ORPOTrainer and CPOTrainer of
trl.experimental) on that batch, without their data pipelines. KTO's responses are all 16, the chosen ones desirable,
and its mismatched pairs are prompt i with the completion of response i + 1, cyclically; "reversed" cases take the two
models the other way round, which makes the estimate of KL positive. float32 on the CPU.

Neither library has BCO on single responses any more; TRL's "bco_pair" is among its DPO figures.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

IGNORE = -100
CASES = {
    "orpo": {"beta": 0.1}, "orpo_b05": {"beta": 0.5},
    "cpo": {"beta": 0.1, "cpo_alpha": 1.0}, "cpo_alpha0": {"beta": 0.3, "cpo_alpha": 0.0},
    "cpo_smoothed": {"beta": 0.1, "cpo_alpha": 0.5, "label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5}, "simpo_g1": {"beta": 2.5, "simpo_gamma": 1.4, "label_smoothing": 0.1},
    "kto": {"beta": 0.1}, "kto_reversed": {"beta": 0.1},
    "kto_reversed_weighted": {"beta": 0.03, "desirable_weight": 1.0, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"beta": 0.1},
}  # fmt: skip


def gradients(loss, model):
    """Norm of all gradients, norm and eight entries of the head's, as in TRL's DPO figures."""
    model.zero_grad()
    loss.backward()
    head = model.lm_head.weight.grad.double()
    entries = [i * (head.shape[0] // 8) for i in range(8)]
    return {
        "grad_norm": torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item(),
        "lm_head_grad_norm": head.norm().item(),
        "lm_head_grad_sample": [head[row, row % head.shape[1]].item() for row in entries],
    }


def without_init(trainer, **attributes):
    made = object.__new__(trainer)
    made.__dict__ |= {"accelerator": Accelerator(cpu=True), "aux_loss_enabled": False} | attributes
    return made


def paired_batch(golden):
    ids, attention, completion = (torch.tensor(golden["batch"][name]) for name in
                                  ("input_ids", "attention_mask", "completion_mask"))  # fmt: skip
    tensors = {"input_ids": ids, "attention_mask": attention, "labels": torch.where(completion.bool(), ids, IGNORE)}
    half = len(ids) // 2
    return {
        f"{side}_{name}": tensor[part]
        for side, part in (("chosen", slice(0, half)), ("rejected", slice(half, None)))
        for name, tensor in tensors.items()
    }


def mismatched(golden):
    """Prompt i with the completion of response i + 1, right-padded: ids, attention mask, completion mask."""
    ids, attention, completion = (torch.tensor(golden["batch"][name]).bool() if "mask" in name else
                                  torch.tensor(golden["batch"][name]) for name in
                                  ("input_ids", "attention_mask", "completion_mask"))  # fmt: skip
    count = len(ids)
    prompts = [ids[i][attention[i] & ~completion[i]] for i in range(count)]
    completions = [ids[i][completion[i]] for i in range(count)]
    joined = [torch.cat([prompts[i], completions[(i + 1) % count]]) for i in range(count)]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "KL_input_ids": pad(joined, batch_first=True),
        "KL_attention_mask": pad([torch.ones_like(row) for row in joined], batch_first=True),
        "KL_completion_mask": pad(
            [(torch.arange(len(row)) >= len(prompts[i])).long() for i, row in enumerate(joined)], batch_first=True
        ),
    }


def orpo_figures(policy, golden, options):
    from trl.experimental.orpo import ORPOTrainer

    trainer = without_init(ORPOTrainer, is_encoder_decoder=False, padding_value=0, **options)
    batch = paired_batch(golden)
    loss, metrics = trainer.get_batch_loss_metrics(policy, batch)
    # its NLL is of prompt and completion: the odds-ratio part alone is what other definitions share
    chosen, rejected, *_ = trainer.concatenated_forward(policy, batch)
    part = -trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    return {"loss": loss.item(), "metrics": metrics, "odds_ratio_loss": part.item(), **gradients(part, policy)}


def cpo_figures(policy, golden, loss_type, options):
    from trl.experimental.cpo import CPOTrainer

    defaults = {"label_smoothing": 0.0, "cpo_alpha": 0.0, "simpo_gamma": 0.5, "alpha": 0.0}
    trainer = without_init(
        CPOTrainer, is_encoder_decoder=False, pad_token_id=0, loss_type=loss_type, **(defaults | options)
    )
    loss, metrics = trainer.get_batch_loss_metrics(policy, paired_batch(golden))
    return {"loss": loss.item(), "metrics": metrics, **gradients(loss, policy)}


def kto_figures(policy, reference, golden, loss_type, options):
    from trl import KTOTrainer

    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    trainer = without_init(
        KTOTrainer, model=policy, ref_model=reference, precompute_ref_logps=False, loss_type=loss_type,
        calculate_KL=loss_type == "kto", args=SimpleNamespace(gradient_checkpointing=False,
        gradient_checkpointing_kwargs=None), _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, **(weights | options),
    )  # fmt: skip
    batch = {name: torch.tensor(values) for name, values in golden["batch"].items()} | mismatched(golden)
    count = len(batch["input_ids"])
    batch["label"] = torch.arange(count) < count // 2
    kl_logps = [trainer._compute_kl_logps(model, batch) for model in (policy, reference)]
    loss = trainer._compute_loss(policy, batch, False)
    (logged,) = (metrics for metrics in trainer._metrics.values() if metrics)
    found = {"loss": loss.item(), "metrics": {name: values[-1] for name, values in logged.items()}}
    if kl_logps[0] is not None:
        found |= {"kl_logps": kl_logps[0].tolist(), "ref_kl_logps": kl_logps[1].tolist()}
    return found | gradients(loss, policy)


def liger_figures(policy, golden):
    """Liger's fused losses of the same hidden states; gradients of the head's weight alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss, LigerFusedLinearORPOLoss, LigerFusedLinearSimPOLoss

    batch = {name: torch.tensor(values) for name, values in golden["batch"].items()}
    with torch.no_grad():
        hidden = policy.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
    targets = torch.where(batch["completion_mask"].bool(), batch["input_ids"], IGNORE)[:, 1:]
    losses = {
        "liger_orpo": LigerFusedLinearORPOLoss(beta=0.1, compiled=False),
        "liger_cpo": LigerFusedLinearCPOLoss(beta=0.1, alpha=0.5, compiled=False),
        "liger_simpo": LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.5, compute_nll_loss=False, compiled=False),
    }
    figures = {}
    for name, loss_fn in losses.items():
        weight = policy.lm_head.weight.detach().clone().requires_grad_()
        loss, _ = loss_fn(weight, hidden.contiguous(), targets.contiguous())
        loss.backward()
        entries = [i * (weight.shape[0] // 8) for i in range(8)]
        figures[name] = {
            "loss": loss.item(),
            "lm_head_grad_norm": weight.grad.double().norm().item(),
            "lm_head_grad_sample": [weight.grad[row, row % weight.shape[1]].item() for row in entries],
        }
    return figures


def main() -> None:
    import transformers
    import trl
    from trl.trainer.utils import add_fused_lm_head

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    with open(options.golden, encoding="utf-8") as file:
        golden = json.load(file)

    def load(name):
        return AutoModelForCausalLM.from_pretrained(f"{options.models}/{name}", dtype=torch.float32).train()

    policy = load("hh-tiny-dpo")
    cases = liger_figures(policy, golden)
    for name, arguments in CASES.items():
        if name.startswith("orpo"):
            cases[name] = orpo_figures(policy, golden, arguments)
        elif name.startswith(("cpo", "simpo")):
            loss_type = "simpo" if name.startswith("simpo") else "sigmoid"
            cases[name] = cpo_figures(policy, golden, loss_type, arguments)
    models = [load("hh-tiny-dpo"), load("hh-tiny")]
    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits"))
    for name, arguments in CASES.items():
        if name.startswith(("kto", "apo")):
            loss_type = "kto" if name.startswith("kto") else name
            fused, reference = reversed(models) if "reversed" in name else models
            cases[name] = kto_figures(fused, reference, golden, loss_type, arguments)
    record = {
        "provenance": {
            "script": "benchmarks/peers/preference_losses.py", "trl": trl.__version__, "liger": version("liger_kernel"),
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "device": "cpu, float32",
        },
        "rows": golden["rows"],
        "cases": {name: {"args": CASES.get(name, {}), **figures} for name, figures in cases.items()},
    }  # fmt: skip
    with open(options.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=None).replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main()
