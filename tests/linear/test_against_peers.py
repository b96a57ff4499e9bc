"""Real preferences and real checkpoints: losses, metrics and gradients as TRL and Liger computed them, every case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastalign.linear import linear_dpo_loss, linear_kto_loss
from fastalign.losses import dpo_loss, kto_kl, summarize
from fastalign.ops import linear_logps, sequence_logps

torch.set_num_threads(1)
PEERS = json.loads((Path(__file__).parents[1] / "losses/golden/peers_preference.json").read_text())
TRL_CASES = [
    *("sigmoid", "sigmoid_b05", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "ld", "fkl", "js", "alpha_div"),
    *("wpo", "mpo"),
]


@pytest.fixture(scope="module")
def golden(shared_dir):
    return json.loads((shared_dir / "golden/trl_dpo.json").read_text())


@pytest.fixture(scope="module")
def models(shared_dir):
    transformers = pytest.importorskip("transformers")

    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(shared_dir / "models" / name, dtype=torch.float32)

    return {name: load(name) for name in ("hh-tiny-dpo", "hh-tiny")}


def forward(model, ids, attention, mask):
    """Hidden states, with the model's graph behind them, and targets aligned with them."""
    hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1]
    return hidden, torch.where(mask[:, 1:].bool(), ids[:, 1:], -100)


@pytest.fixture(scope="module")
def batch(golden):
    return [torch.tensor(golden["batch"][name]) for name in ("input_ids", "attention_mask", "completion_mask")]


@pytest.fixture(scope="module")
def policies(models, batch):
    """Per model: the model, its hidden states as a leaf with the same states in the graph, targets."""
    found = {}
    for name, model in models.items():
        hidden, targets = forward(model, *batch)
        found[name] = model, hidden.detach().requires_grad_(), hidden, targets
    return found


def close(value, expected, tolerance, absolute=0.0):
    assert value.item() == pytest.approx(expected, rel=tolerance, abs=absolute)


WHOLE = ("orpo", "cpo", "simpo", "kto_reversed", "apo_zero_unpaired")  # cases whose gradients are followed to the end


def check_gradients(loss, policy, case, name):
    """The head's gradient; in some cases the norm of all of them, through the hidden states into the whole model."""
    model, leaf, hidden, _ = policy
    head, into = torch.autograd.grad(loss, [model.lm_head.weight, leaf])
    close(head.double().norm(), case["lm_head_grad_norm"], 1e-4)
    sample = [head[row, row % head.shape[1]] for row in range(0, head.shape[0], head.shape[0] // 8)]
    assert torch.stack(sample[:8]).tolist() == pytest.approx(
        case["lm_head_grad_sample"], rel=1e-3, abs=1e-6 * case["lm_head_grad_norm"]
    )
    if name in WHOLE:
        grads = torch.autograd.grad(hidden, list(model.model.parameters()), into, retain_graph=True)
        close(torch.stack([grad.double().norm() for grad in (head, *grads)]).norm(), case["grad_norm"], 1e-4)


def check_metrics(output, expected, names):
    values = summarize(output.metrics)
    for name in names:
        close(values[name], expected[name], 1e-5, 1e-5 * max(1, abs(expected[name])))


# ---- TRL's DPOTrainer


def test_per_token_log_probs(golden, policies):
    model, leaf, _, targets = policies["hh-tiny-dpo"]
    expected = torch.tensor(golden["policy_per_token_logps"], dtype=torch.float64)
    ours = linear_logps(leaf.detach(), model.lm_head.weight.detach(), targets).logps.double()
    assert ((ours - expected).abs() <= 3e-5 + 1e-5 * expected.abs()).all()


def test_no_case_of_trl_is_left_out(golden):
    assert list(golden["cases"]) == TRL_CASES


@pytest.mark.parametrize("name", TRL_CASES)
def test_trl_dpo(golden, policies, name):
    """TRL's "sft" alone still logs rewards, measured from a reference that its loss does not have: those are not ours.

    The norm of all gradients is compared where a whole trainer runs.
    """
    case, policy = golden["cases"][name], policies["hh-tiny-dpo"]
    model, leaf, _, targets = policy
    # both ways to give the reference; exp(−s) of forward_kl multiplies what float32 leaves of a sum of −200 nats
    per_token = name in ("ld", "mpo", "fkl")
    ref = torch.tensor(golden["reference_per_token_logps" if per_token else "reference_logps"])
    alone = name == "sft"
    output = linear_dpo_loss(
        leaf, model.lm_head.weight, targets, ref_logps=None if alone else ref, token_metrics=True, **case["args"]
    )
    close(output.loss, case["loss"], 1e-5)
    check_metrics(output, case["metrics"], [
        key for key in case["metrics"] if key != "num_tokens" and not (alone and key.startswith("rewards/"))
    ])  # fmt: skip
    check_gradients(output.loss, policy, case, name)


@pytest.mark.parametrize("name", [name for name in TRL_CASES if name not in ("wpo", "sft")])
def test_trl_dpo_from_sums(golden, name):
    """The same from TRL's own log-probs, unfused: losses and metrics to their rounding."""
    case = golden["cases"][name]
    mask = torch.tensor(golden["batch"]["completion_mask"])[:, 1:].bool()
    lengths = mask.sum(1).chunk(2)
    per_token = [torch.tensor(golden[f"{model}_per_token_logps"], dtype=torch.float64)
                 for model in ("policy", "reference")]  # fmt: skip
    shared = torch.minimum(*lengths).repeat(2)
    tail = mask & (mask.cumsum(1) > shared[:, None])
    sums, tails = ([half for t in per_token for half in (t * keep).sum(1).chunk(2)] for keep in (mask, tail))
    more = {"tail_logps": tails} if "ld_alpha" in case["args"] else {}
    output = dpo_loss(*sums, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **more, **case["args"])
    close(output.loss, case["loss"], 1e-5)
    check_metrics(output, case["metrics"], [key for key in case["metrics"] if key.startswith(("rewards/", "logps/"))])


# ---- TRL's KTOTrainer, ORPOTrainer and CPOTrainer; Liger


def peer_cases(*prefixes):
    return [name for name in PEERS["cases"] if name.startswith(prefixes)]


def test_no_case_of_the_peers_is_left_out():
    assert peer_cases("orpo", "cpo", "simpo", "kto", "apo", "liger") == list(PEERS["cases"])


@pytest.mark.parametrize("name", peer_cases("orpo"))
def test_trl_orpo(policies, name):
    """TRL's likelihood term spans prompt and completion, over the tokens of the batch; the paper's and ours is of the
    completion, per pair. The odds-ratio part is the same: compared by itself, value and gradient.
    """
    case, policy = PEERS["cases"][name], policies["hh-tiny-dpo"]
    model, leaf, _, targets = policy
    output = linear_dpo_loss(leaf, model.lm_head.weight, targets, loss_type="orpo", **case["args"])
    check_metrics(output, case["metrics"], [
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("log_odds_ratio", "log_odds_chosen"),
    ])  # fmt: skip
    chosen = linear_logps(leaf, model.lm_head.weight, targets).logps[:8]
    lengths = (targets[:8] != -100).sum(1)
    likelihood = (-sequence_logps(chosen) / lengths).mean()
    plain = linear_dpo_loss(
        leaf, model.lm_head.weight, targets, loss_type="orpo", **case["args"], schedule="deferred"
    ).loss
    part = plain - likelihood
    close(part, case["odds_ratio_loss"], 1e-5)
    close(part, case["loss"] - case["metrics"]["nll_loss"], 1e-5)
    check_gradients(part, policy, case, name)
    torch.testing.assert_close(output.loss, plain)


@pytest.mark.parametrize("name", peer_cases("cpo", "simpo"))
def test_trl_cpo(policies, name):
    """TRL's likelihood term is the mean over the chosen tokens of the batch: our "sft"; that of "cpo" is per pair.
    Its simpo is ours as it is; its logged log-probs are means there, ours always sums.
    """
    case, policy = PEERS["cases"][name], policies["hh-tiny-dpo"]
    model, leaf, _, targets = policy
    options = dict(case["args"])
    if name.startswith("cpo"):
        weight = options["cpo_alpha"]
        options |= {"loss_type": ["cpo", "sft"], "loss_weights": [1.0, weight], "cpo_alpha": 0.0}
    else:
        options["loss_type"] = "simpo"
    output = linear_dpo_loss(leaf, model.lm_head.weight, targets, **options)
    close(output.loss, case["loss"], 1e-5)
    names = [f"rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies")]
    if name.startswith("cpo"):
        names += ["logps/chosen", "logps/rejected"]
        names += ["nll_loss"] if options["loss_weights"][1] else []  # TRL logs 0 where the term is off
    check_metrics(output, case["metrics"], names)
    check_gradients(output.loss, policy, case, name)


def mismatched(batch):
    """Prompt i with the completion of response i + 1, cyclically."""
    ids, attention, completion = batch[0], batch[1].bool(), batch[2].bool()
    prompts = [row[keep] for row, keep in zip(ids, attention & ~completion, strict=True)]
    completions = [row[keep] for row, keep in zip(ids, completion, strict=True)]
    rows = [torch.cat([p, c]) for p, c in zip(prompts, completions[1:] + completions[:1], strict=True)]
    masks = [torch.arange(len(row)) >= len(p) for row, p in zip(rows, prompts, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    return [pad(part, batch_first=True) for part in (rows, [torch.ones_like(row) for row in rows], masks)]


@pytest.fixture(scope="module")
def kl_logps(models, batch):
    with torch.no_grad():
        found = {}
        for name, model in models.items():
            hidden, targets = forward(model, *mismatched(batch))
            found[name] = sequence_logps(linear_logps(hidden, model.lm_head.weight, targets).logps)
    return found


@pytest.mark.parametrize("name", peer_cases("kto", "apo"))
def test_trl_kto(policies, kl_logps, name):
    case = PEERS["cases"][name]
    mine, other = ("hh-tiny", "hh-tiny-dpo") if "reversed" in name else ("hh-tiny-dpo", "hh-tiny")
    model, leaf, _, targets = policy = policies[mine]
    with torch.no_grad():
        reference, hidden, *_ = policies[other]
        ref = sequence_logps(linear_logps(hidden, reference.lm_head.weight, targets).logps)
    kl, loss_type = None, "apo_zero_unpaired"
    if name.startswith("kto"):
        loss_type, kl = "kto", kto_kl(kl_logps[mine], kl_logps[other]).value
        torch.testing.assert_close(kl_logps[mine], torch.tensor(case["kl_logps"]), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(kl_logps[other], torch.tensor(case["ref_kl_logps"]), rtol=1e-5, atol=1e-3)
        assert (kl > 0) == ("reversed" in name)
    output = linear_kto_loss(
        leaf, model.lm_head.weight, targets, ref_logps=ref, labels=torch.arange(16) < 8, kl=kl, loss_type=loss_type,
        token_metrics=True, **case["args"],
    )  # fmt: skip
    close(output.loss, case["loss"], 1e-5)
    names = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "entropy"]
    check_metrics(
        output, case["metrics"], [*names, "logits/chosen", "logits/rejected", *(["kl"] if kl is not None else [])]
    )
    check_gradients(output.loss, policy, case, name)


@pytest.mark.parametrize("name", peer_cases("liger"))
def test_liger(policies, name):
    """Its likelihood term is the mean over the chosen tokens of the batch, in ORPO as in CPO."""
    case = PEERS["cases"][name]
    model, leaf, _, targets = policy = policies["hh-tiny-dpo"]

    def loss(**options):
        return linear_dpo_loss(leaf, model.lm_head.weight, targets, schedule="deferred", **options).loss

    if name == "liger_orpo":
        sums = sequence_logps(linear_logps(leaf, model.lm_head.weight, targets).logps[:8])
        per_pair = (-sums / (targets[:8] != -100).sum(1)).mean()
        found = loss(loss_type=["orpo", "sft"], beta=0.1) - per_pair
    elif name == "liger_cpo":
        found = loss(loss_type=["cpo", "sft"], loss_weights=[1.0, 0.5], cpo_alpha=0.0, beta=0.1)
    else:
        found = loss(loss_type="simpo", beta=2.0, simpo_gamma=0.5)
    close(found, case["loss"], 1e-5)
    check_gradients(found, policy, case, name)
