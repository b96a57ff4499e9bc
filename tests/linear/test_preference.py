"""The fused preference losses equal their unfused definitions, padded and packed."""

from __future__ import annotations

import re

import pytest
import torch

from fastalign.linear import linear_dpo_loss, preference
from fastalign.losses import DPO_LOSSES, dpo_loss, wpo_weights
from fastalign.ops import linear_logps, linear_logps_reference
from fastalign.types import LinearLogps, LossOutput

torch.set_num_threads(1)
PAIRS = [name for name, variant in DPO_LOSSES.items() if variant.rows == "pairs"]
EVERYTHING = {  # every option that reaches a loss, at once where a variant takes it
    "label_smoothing": 0.1, "length_alpha": 0.05, "f_divergence_type": "alpha_divergence",
    "f_alpha_divergence_coef": 0.7, "discopop_tau": 0.3, "ld_alpha": 0.4, "use_weighting": True, "simpo_gamma": 1.1,
    "cpo_alpha": 0.6,
}  # fmt: skip


def cases():
    for name in PAIRS:
        variant = DPO_LOSSES[name]
        plain = {"loss_type": name} | ({"label_smoothing": 0.01} if name == "exo_pair" else {})
        full = plain | {key: value for key, value in EVERYTHING.items() if key in variant.options}
        full |= {"shift": 0.2} if variant.accepts_shift else {}
        yield pytest.param(plain, id=name)
        yield pytest.param(full, id=f"{name}-everything")
    mixed = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield pytest.param(mixed, id="list")
    yield pytest.param({"loss_type": ["hinge", "cpo", "sft"], "ld_alpha": 0.3, "use_weighting": True}, id="list-mixed")
    yield pytest.param({"loss_type": ["simpo", "sft"]}, id="list-without-reference")
    yield pytest.param({"loss_type": ["aot", "sigmoid"], "ld_alpha": 0.3}, id="list-coupled")


def needs_reference(options):
    names = options.get("loss_type", "sigmoid")
    return any(DPO_LOSSES[name].needs_reference for name in ([names] if isinstance(names, str) else names))


def build(P=5, T=9, H=16, V=120, dtype=torch.float64, seed=0):
    """The reference is per token; NaN where it does not count."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * P, T, H, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g) * 0.3).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (2 * P, T), generator=g)
    targets[torch.rand(2 * P, T, generator=g) < 0.4] = -100
    targets[:, 0] = 1  # no empty response
    ref = -5 + torch.randn(2 * P, T, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, targets, ref.masked_fill(targets == -100, torch.nan)


def sums_of(per_token, mask):
    return torch.where(mask, per_token, 0.0).sum(1)


def unfused(hidden, weight, bias, targets, ref, **options):
    out = linear_logps(hidden, weight, targets, bias=bias, log_sum_sq_probs=True)
    mask = targets != -100
    lengths = mask.sum(1).chunk(2)
    tail = mask & (mask.cumsum(1) > torch.minimum(*lengths).repeat(2)[:, None])
    values = [out.logps, ref] if needs_reference(options) else [out.logps]
    logps = [half for value in values for half in sums_of(value, mask).chunk(2)]
    if "ld_alpha" in options:
        options["tail_logps"] = [half for value in values for half in sums_of(value, tail).chunk(2)]
    if "use_weighting" in options:
        aligned = sums_of(out.logps - out.log_sum_sq_probs, mask) / mask.sum(1)
        options["weights"] = wpo_weights(*aligned.chunk(2))
    return dpo_loss(*logps, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options)


def arguments(problem, options, packed=False, per_token=None):
    """Positional and keyword arguments of the fused loss; the reference as sums where nothing asks for tokens."""
    hidden, weight, bias, targets, ref = problem
    given = {"bias": bias}
    if needs_reference(options):
        per_token = "ld_alpha" in options if per_token is None else per_token
        given["ref_logps"] = ref if per_token else sums_of(ref, targets != -100)
    if packed:
        N = targets.numel()
        if "ref_logps" in given and given["ref_logps"].dim() == 2:
            given["ref_logps"] = given["ref_logps"].reshape(N)
        given["cu_seqlens"] = torch.arange(0, N + 1, targets.shape[1], dtype=torch.int32)
        hidden, targets = hidden.reshape(N, -1), targets.reshape(N)
    return (hidden, weight, targets), given


def same_gradients(mine, true, leaves):
    for one, other in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(true, leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("workspace_mb", [0.01, 0.1, None], ids=["tiny", "small", "default"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [*cases()])
def test_linear_dpo_loss_is_dpo_loss_of_sequence_logps(options, packed, workspace_mb):
    problem = build()
    options = options | {"beta": 0.3}
    given, named = arguments(problem, options, packed)
    fused = linear_dpo_loss(*given, **named, workspace_mb=workspace_mb, **options)
    plain = unfused(*problem, **options)
    torch.testing.assert_close(fused.loss, plain.loss)
    assert fused.metrics.keys() == plain.metrics.keys()
    for name in plain.metrics:
        torch.testing.assert_close(fused.metrics[name].value, plain.metrics[name].value, msg=name)
    same_gradients(fused.loss, plain.loss, problem[:3])


@pytest.mark.parametrize("schedule", ["streamed", "deferred", "overlaid", "cached"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_down", "orpo"])
def test_schedules(loss_type, schedule):
    problem = build(T=30, H=40)
    options = {"loss_type": loss_type, "use_weighting": True}
    given, named = arguments(problem, options)
    fused = linear_dpo_loss(*given, **named, **options, schedule=schedule, workspace_mb=0.3)
    plain = unfused(*problem, **options)
    torch.testing.assert_close(fused.loss, plain.loss)
    same_gradients(fused.loss, plain.loss, problem[:3])


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", ["sigmoid", "aot"]])
def test_a_coupled_loss_is_never_streamed(loss_type):
    """Streamed pair by pair its sort would see one pair at a time, and be the paired loss."""
    problem = build()
    given, named = arguments(problem, {})
    with pytest.raises(ValueError, match=re.escape(f"schedule='streamed' needs a sum over pairs, but {loss_type=}")):
        linear_dpo_loss(*given, **named, loss_type=loss_type, schedule="streamed")
    fused = linear_dpo_loss(*given, **named, loss_type=loss_type, num_items=20, workspace_mb=0.01)
    each = linear_dpo_loss(*given, **named, loss_type=loss_type, reduction="none").loss
    assert each.shape == (5,)
    torch.testing.assert_close(fused.loss, each.sum() / 20)
    paired = linear_dpo_loss(*given, **named).loss
    assert abs(fused.loss * 4 - paired) > 1e-4


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_reference_per_token_or_per_sequence(packed):
    problem = build()
    losses = []
    for per_token in (False, True):
        given, named = arguments(problem, {}, packed, per_token)
        losses.append(linear_dpo_loss(*given, **named, workspace_mb=0.01).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid", "sft"]])
def test_reductions_and_the_global_denominator(loss_type):
    problem = build()
    given, named = arguments(problem, {})
    named |= {"loss_type": loss_type}
    tokens = int((problem[3][:5] != -100).sum())
    mean = linear_dpo_loss(*given, **named).loss
    each = linear_dpo_loss(*given, **named, reduction="none").loss
    total = linear_dpo_loss(*given, **named, reduction="sum").loss
    more = {} if loss_type == "sigmoid" else {"num_chosen_tokens": torch.tensor(tokens * 4)}
    shared = linear_dpo_loss(*given, **named, num_items=torch.tensor(20), **more).loss
    assert each.shape == (5,)
    for value, expected in ((mean, each.mean()), (total, each.sum()), (shared, each.sum() / 20)):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("options", [{"loss_type": ["sigmoid", "sft"]}, {"loss_type": "cpo"}, {"ld_alpha": 0.4}])
def test_micro_batches_add_up(options):
    hidden, weight, bias, targets, ref = problem = build(P=6)
    given, named = arguments(problem, options)
    tokens = {"num_chosen_tokens": (targets[:6] != -100).sum()} if "sft" in options.get("loss_type", "") else {}
    whole = linear_dpo_loss(*given, **named, **options)
    parts = []
    for first, last in ((0, 1), (1, 4), (4, 6)):
        index = torch.tensor([*range(first, last), *range(6 + first, 6 + last)])
        part = [hidden[index], weight, bias, targets[index], ref[index]]
        given, named = arguments(part, options)
        parts.append(linear_dpo_loss(*given, **named, **options, num_items=6, **tokens).loss)
    torch.testing.assert_close(sum(parts), whole.loss)
    same_gradients(sum(parts), whole.loss, [hidden, weight, bias])


def test_rows_known_on_the_host_and_one_by_one():
    problem = build()
    options = {"loss_type": ["sigmoid", "sft"]}
    given, named = arguments(problem, options)
    rows = (problem[3].flatten() != -100).nonzero()[:, 0]
    found, known = (linear_dpo_loss(*given, **named, **options, rows=r).loss for r in (None, rows))
    torch.testing.assert_close(found, known, rtol=1e-14, atol=0)


@pytest.mark.parametrize("options", [*cases()])
def test_an_empty_batch_and_no_gradient(options):
    problem = [t[:0] if t.dim() > 1 and t.shape[0] == 10 else t for t in build()]
    given, named = arguments(problem, options)
    assert linear_dpo_loss(*given, **named, **options).loss.item() == 0
    problem = build()
    given, named = arguments(problem, options)
    trained = linear_dpo_loss(*given, **named, **options).loss
    with torch.no_grad():
        evaluated = linear_dpo_loss(*given, **named, **options).loss
    torch.testing.assert_close(trained.detach(), evaluated)
    assert not evaluated.requires_grad


def test_token_metrics():
    problem = build()
    given, named = arguments(problem, {})
    metrics = linear_dpo_loss(*given, **named, token_metrics=True).metrics
    hidden, weight, bias, targets, _ = problem
    exact = linear_logps_reference(hidden, weight, targets, bias=bias)
    mask = targets != -100
    torch.testing.assert_close(metrics["entropy"].value, exact.entropy[mask].mean().detach())
    torch.testing.assert_close(metrics["mean_token_accuracy"].value, exact.is_top1[:5][mask[:5]].float().mean())
    torch.testing.assert_close(metrics["logits/rejected"].value, exact.mean_logits[5:][mask[5:]].mean().detach())


@pytest.mark.parametrize("options", [*cases()])
def test_the_loss_of_a_chunk_never_reads_a_value_on_the_host(options, monkeypatch):
    """On the meta device a host sync is an error; boundaries and groups are on the host."""
    problem = build()
    given, named = arguments(problem, options)
    taken = {}

    def catch(loss_fn, *args, metrics_fn, inputs, **kwargs):
        taken.update(loss_fn=loss_fn, metrics_fn=metrics_fn, inputs=inputs)
        return LossOutput(torch.zeros(5), {})

    monkeypatch.setattr(preference, "linear_loss", catch)
    linear_dpo_loss(*given, **named, **options, token_metrics=True)
    mask = problem[3] != -100
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
    n = int(cu[-1])
    values = torch.zeros(n, device="meta")
    scored = LinearLogps(values, values, values, values.bool(), values, values)
    inputs = {
        name: (t[mask] if t.shape == mask.shape else t).to("meta", torch.float32) for name, t in taken["inputs"].items()
    }
    losses = taken["loss_fn"](scored, cu, **inputs)
    assert losses.device.type == "meta"
    assert losses.shape == (5,)
    assert all(metric.total.device.type == "meta" for metric in taken["metrics_fn"](scored, cu, **inputs).values())


PACKED = {"hidden": torch.randn(4, 4), "targets": torch.zeros(4, dtype=torch.int64),
          "cu_seqlens": torch.arange(5, dtype=torch.int32)}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("equal halves", {"hidden": torch.randn(3, 2, 4), "targets": torch.zeros(3, 2, dtype=torch.int64)}),
        ("ref_logps must be (4,), one sum per sequence, or (4, 2)", {"ref_logps": torch.zeros(3)}),
        ("ref_logps requires grad", {"ref_logps": torch.zeros(4, requires_grad=True)}),
        ("ld_alpha=0.4 weighs the tokens of the reference: ref_logps must be (4, 2)", {"ld_alpha": 0.4}),
        ("ld_alpha=0.4 weighs the tokens", {"ld_alpha": 0.4, **PACKED}),  # cannot be told from sums
        ("loss_type='simoid'", {"loss_type": "simoid"}),
        ("'kto' is a loss on single responses: call kto_loss", {"loss_type": "kto"}),
        ("needs the reference's log-probs", {"ref_logps": None}),
        ("'simpo' has no reference", {"loss_type": "simpo"}),
        ("does not take simpo_gamma", {"simpo_gamma": 1.0}),
        ("does not take shift", {"shift": 1.0}),
        ("num_chosen_tokens is the denominator of 'sft'", {"num_chosen_tokens": 7}),
        ("then needs num_chosen_tokens", {"loss_type": ["sigmoid", "sft"], "num_items": 7}),
        ("reduction", {"reduction": "median"}),
        ("packed hidden", {"hidden": torch.randn(4, 4), "targets": torch.zeros(4, dtype=torch.int64)}),
    ],
)
def test_bad_arguments_are_named_before_anything_is_computed(message, change, monkeypatch):
    monkeypatch.setattr(preference, "linear_loss", None)
    given = {
        "hidden": torch.randn(4, 2, 4), "weight": torch.randn(9, 4), "targets": torch.zeros(4, 2, dtype=torch.int64),
        "ref_logps": torch.zeros(4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_dpo_loss(**(given | change))


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "deferred"])
def test_weights_of_pairs_carry_no_gradient(streamed):
    """The gradient of a weighted pair is the pair's own, times a number."""
    problem = build(P=1)
    given, named = arguments(problem, {})
    schedule = "streamed" if streamed else "deferred"
    plain, weighted = (
        linear_dpo_loss(*given, **named, use_weighting=on, schedule=schedule).loss for on in (False, True)
    )
    factor = (weighted / plain).item()
    assert 0 < factor != 1
    for one, other in zip(
        torch.autograd.grad(weighted, problem[:3]), torch.autograd.grad(plain, problem[:3]), strict=True
    ):
        torch.testing.assert_close(one, factor * other)
