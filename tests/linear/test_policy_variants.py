"""linear_ppo_loss with every loss_type: ppo_loss of linear_logps, padded and packed, whatever the schedule."""

from __future__ import annotations

import pytest
import torch

from fastalign.linear import linear_ppo_loss
from fastalign.losses import AGGREGATIONS, ppo_loss, summarize
from fastalign.losses.policy_options import POLICY_LOSSES
from fastalign.losses.sampler import SAMPLER_CORRECTIONS
from fastalign.ops import linear_logps_reference
from fastalign.ops.tile_sizes import align
from fastalign.ops.tiles import Tiles

B, T, H, V = 5, 9, 16, 120
WIDE = {"epsilon_low": 0.1, "epsilon_high": 0.15}
GIVEN = ("old_logps", "advantages", "ref_logps", "sampler_logps")


def make(seed=0, B=B, T=T, H=H):
    """hidden, weight, bias, targets with a sequence that has none, and per-token inputs with NaN outside."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H), (V, H), (V,)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).mul_(0.5).requires_grad_() for s in shapes)
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[torch.rand(B, T, generator=g) < 0.4] = -100
    targets[1] = -100
    old, advantages, ref, sampler = torch.randn(4, B, T, generator=g, dtype=torch.float64)
    reference = linear_logps_reference(hidden, weight, targets, bias=bias).logps.detach()
    tensors = {
        "old_logps": reference + 0.2 * old + 0.15 * old[:, :1], "advantages": advantages,
        "ref_logps": reference + 0.2 * ref, "sampler_logps": reference + 0.4 * sampler,
    }  # fmt: skip
    return hidden, weight, bias, targets, {k: torch.where(targets == -100, torch.nan, v) for k, v in tensors.items()}


def constants(loss_type, aggregation=None):
    constant = (aggregation or POLICY_LOSSES[loss_type].aggregation) == "constant"
    return {"max_completion_length": 11} if constant else {}


def unfused(hidden, weight, bias, targets, given, **options):
    exact = linear_logps_reference(hidden, weight, targets, bias=bias)
    return ppo_loss(exact.logps, mask=targets != -100, **given, entropy=exact.entropy, **options)


def assert_equal(ours, expected, leaves, but=()):
    torch.testing.assert_close(ours.loss, expected.loss)
    pairs = zip(torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True)
    for mine, true in pairs:
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-10)
    found, known = summarize(ours.metrics), summarize(expected.metrics)
    assert found.keys() == known.keys()
    for name in known.keys() - set(but):
        torch.testing.assert_close(found[name], known[name])


@pytest.mark.parametrize("workspace_mb", [None, 0.02, 0.002], ids=["default", "small", "tiny"])
@pytest.mark.parametrize("schedule", ["auto", "streamed", "deferred"])
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_fused_is_unfused(loss_type, schedule, workspace_mb):
    hidden, weight, bias, targets, given = make()
    options = {
        "loss_type": loss_type, "kl_coef": 0.1, "entropy_coef": 0.01, "sampler_cap": 1.3, **WIDE, **constants(loss_type)
    }  # fmt: skip
    expected = unfused(hidden, weight, bias, targets, given, **options)
    ours = linear_ppo_loss(
        hidden, weight, targets, **given, bias=bias, schedule=schedule, workspace_mb=workspace_mb, **options
    )
    assert_equal(ours, expected, [hidden, weight, bias])
    assert 0 < float(expected.metrics["clip_fraction"].value) < 1
    assert 0 < float(expected.metrics["sampler_capped"].value) < 1


LEVELS = [("ppo", "sequence"), ("gspo", "sequence_token"), ("cispo", "sequence")]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("loss_type", "level"), [*LEVELS, ("ppo", "token")])
def test_levels_and_layouts(loss_type, level, aggregation, packed):
    """Packed: sequences of unequal length one after the other, with tokens in between that are not scored."""
    hidden, weight, bias, targets, given = make(seed=1)
    options = {
        "loss_type": loss_type, "importance_sampling_level": level, "aggregation": aggregation, **WIDE,
        **constants(loss_type, aggregation),
    }  # fmt: skip
    given = {name: given[name] for name in ("old_logps", "advantages")}
    expected = unfused(hidden, weight, bias, targets, given, **options)
    if packed:
        keep = torch.tensor([7, 9, 3, 9, 5])
        outside = torch.arange(T) >= keep[:, None]
        targets = torch.where(outside, -100, targets)
        expected = unfused(hidden, weight, bias, targets, given, **options)
        cu = torch.cat([torch.zeros(1), keep.cumsum(0)]).to(torch.int32)
        given = {name: tensor[~outside] for name, tensor in given.items()}
        ours = linear_ppo_loss(
            hidden[~outside], weight, targets[~outside], **given, bias=bias, cu_seqlens=cu, token_metrics=True,
            schedule="streamed", workspace_mb=0.01, **options,
        )  # fmt: skip
    else:
        rows = (targets.flatten() != -100).nonzero()[:, 0]
        ours = linear_ppo_loss(hidden, weight, targets, **given, bias=bias, rows=rows, token_metrics=True, **options)
    assert_equal(ours, expected, [hidden, weight, bias])


@pytest.mark.parametrize("correction", SAMPLER_CORRECTIONS)
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_corrections_of_the_sampler(loss_type, correction):
    hidden, weight, bias, targets, given = make(seed=2)
    options = {"loss_type": loss_type, "sampler_correction": correction, "sampler_cap": 1.2, **WIDE}
    expected = unfused(hidden, weight, bias, targets, given, **options)
    ours = linear_ppo_loss(hidden, weight, targets, **given, bias=bias, token_metrics=True, **options)
    assert_equal(ours, expected, [hidden, weight, bias])
    expected = unfused(hidden, weight, bias, targets, given, **options)
    flat = {name: tensor.flatten() for name, tensor in given.items()}
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    packed = linear_ppo_loss(
        hidden.flatten(0, 1), weight, targets.flatten(), **flat, bias=bias, cu_seqlens=cu, token_metrics=True, **options
    )
    assert_equal(packed, expected, [hidden, weight, bias])


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_micro_batches_add_up(loss_type):
    """With the whole's count, tokens or sequences."""
    hidden, weight, bias, targets, given = make(seed=3)
    options = {"loss_type": loss_type, "kl_coef": 0.1, "bias": bias, **WIDE, **constants(loss_type)}
    whole = linear_ppo_loss(hidden, weight, targets, **given, **options)
    scored = targets != -100
    items = int(scored.sum()) if POLICY_LOSSES[loss_type].aggregation == "token_mean" else int(scored.any(1).sum())
    parts = [
        linear_ppo_loss(
            hidden[i], weight, targets[i], num_items=items, **{k: v[i] for k, v in given.items()}, **options
        ).loss
        for i in (slice(0, 1), slice(1, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    leaves = [hidden, weight, bias]
    for a, b in zip(torch.autograd.grad(sum(parts), leaves), torch.autograd.grad(whole.loss, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    total = linear_ppo_loss(hidden, weight, targets, reduction="sum", **given, **options).loss
    weight_of_all = items * (11 if loss_type == "dr_grpo" else 1)
    torch.testing.assert_close(total / weight_of_all, whole.loss)


@pytest.mark.parametrize("schedule", ["streamed", "deferred"])
def test_clipped_sequences_stay_out_of_the_gradient_gemms(schedule, monkeypatch):
    """GSPO clips a sequence as a whole: none of its tokens has a gradient, and none takes part in a GEMM."""
    hidden, weight, bias, targets, given = make(seed=4, B=8, T=20, H=32)
    scored = targets != -100
    logps = linear_logps_reference(hidden, weight, targets, bias=bias).logps.detach()
    advantages = torch.where(torch.arange(8)[:, None] % 2 == 0, 1.0, -1.0).double().expand(8, 20)
    far = torch.arange(8)[:, None] % 3 == 0  # moved along the advantage, beyond the clip
    old = torch.where(far, logps - 0.3 * advantages, logps + 0.01 * given["advantages"])
    given = {"old_logps": torch.where(scored, old, torch.nan), "advantages": advantages}
    rows: list[int] = []
    add = Tiles.add_weight

    def counting(self, sinks, v0, v1, grad, *others):
        rows.extend([grad.shape[0]] if v0 == 0 else [])
        add(self, sinks, v0, v1, grad, *others)

    monkeypatch.setattr(Tiles, "add_weight", counting)
    options = {"loss_type": "gspo", **WIDE}
    ours = linear_ppo_loss(hidden, weight, targets, **given, bias=bias, schedule=schedule, **options)
    (grad,) = torch.autograd.grad(ours.loss, hidden)
    alive = scored & ~far
    assert torch.equal(grad.abs().sum(-1) > 0, alive)
    assert sum(rows) == align(int(alive.sum())) < align(int(scored.sum()))
    torch.testing.assert_close(
        grad, torch.autograd.grad(unfused(hidden, weight, bias, targets, given, **options).loss, hidden)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss_type", ["gspo", "cispo"])
def test_error_is_at_most_twice_naives(loss_type, dtype):
    """Gradients, against float64 on the same rounded inputs, beside plain PyTorch in the same dtype."""
    hidden, weight, _, targets, given = make(seed=6, B=6, T=12, H=48)
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    logps = linear_logps_reference(*wide, targets).logps.detach()
    old = logps + 0.1 * torch.where(targets == -100, 0.0, given["advantages"]).cos()
    given = {"old_logps": old.float(), "advantages": given["advantages"].float()}
    options = {"loss_type": loss_type, **WIDE}
    mask = targets != -100

    def gradients(tensors, loss):
        return [gradient.double() for gradient in torch.autograd.grad(loss, tensors)]

    def plain(tensors):
        table = (tensors[0] @ tensors[1].T).to(torch.promote_types(tensors[0].dtype, torch.float32)).log_softmax(-1)
        found = table.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return ppo_loss(found, mask=mask, **given, **options).loss

    exact = gradients(wide, plain(wide))
    naive = gradients(leaves, plain(leaves))
    ours = gradients(
        leaves, linear_ppo_loss(leaves[0], leaves[1], targets, **given, schedule="streamed", **options).loss
    )
    for got, other, true in zip(ours, naive, exact, strict=True):
        assert true.norm() > 0
        floor = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (got - true).abs().max() <= 2 * (other - true).abs().max() + floor


def test_sequences_are_scored_once(monkeypatch):
    """Three GEMMs: whole sequences fit the workspace, so that no logits are computed a second time."""
    hidden, weight, bias, targets, given = make(seed=5, B=8, T=20, H=32)
    rows: list[int] = []
    forward = Tiles.forward

    def counting(self, block, *others):
        rows.append(block.n)
        return forward(self, block, *others)

    monkeypatch.setattr(Tiles, "forward", counting)
    given = {name: given[name] for name in ("old_logps", "advantages")}
    ours = linear_ppo_loss(
        hidden, weight, targets, **given, bias=bias, loss_type="gspo", schedule="streamed", workspace_mb=0.05, **WIDE
    )
    assert ours.loss.requires_grad
    assert len(rows) > 1  # several chunks
    assert sum(rows) == int((targets != -100).sum())


def test_as_many_packed_sequences_as_tokens():
    """Of lengths 2, 0 and 1: per-token inputs must not be taken for one a sequence."""
    hidden, weight, bias, *_ = make()
    targets = torch.tensor([3, 4, 5])
    old = linear_logps_reference(hidden[0, :3], weight, targets, bias=bias).logps.detach() + torch.tensor(
        [0.1, -0.3, 0.2]
    )
    advantages = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    options = {"loss_type": "gspo", **WIDE}
    ours = linear_ppo_loss(
        hidden[0, :3], weight, targets, old_logps=old, advantages=advantages, bias=bias, cu_seqlens=cu, **options
    )
    logps = linear_logps_reference(hidden[0, :3], weight, targets, bias=bias).logps
    rows, mask = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[True, True], [True, False]])
    expected = ppo_loss(logps[rows], old[rows], advantages[rows], mask, **options)
    torch.testing.assert_close(ours.loss, expected.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "gspo"}, "importance_sampling_level='sequence' needs sequences: targets"),
        ({"loss_type": "grpo"}, "aggregation='sequence_mean' needs sequences"),
        ({"sampler_correction": "sequence_mask"}, "sampler_correction='sequence_mask' needs sequences"),
        ({"loss_type": "gspo", "cu_seqlens": torch.tensor([0, 9])}, "rises from 0 to N"),
        ({"loss_type": "gspo", "cu_seqlens": torch.tensor([0, 30, 20, 45])}, "rises from 0 to N"),
        ({"sampler_logps": torch.zeros(45, requires_grad=True)}, "sampler_logps requires grad"),
        ({"sampler_logps": torch.zeros(44)}, r"sampler_logps: shape \(44,\)"),
        ({"loss_type": "cispo", "dual_clip": 2.0}, "does not take dual_clip"),
        ({"sampler_logps": None, "sampler_cap": 3.0}, "have no effect without sampler_logps"),
    ],
)
def test_refusals(change, message):
    hidden, weight, _, targets, given = make()
    flat = {name: tensor.flatten() for name, tensor in given.items()} | change
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(hidden.flatten(0, 1), weight, targets.flatten(), **flat)


@pytest.mark.gpu
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_no_host_synchronisation(loss_type):
    """With rows on the host, nothing in loss, gradient or metrics waits for the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    hidden, weight, _, targets, given = make()
    rows = (targets.flatten() != -100).nonzero()[:, 0]
    hidden, weight = (t.detach().float().cuda().requires_grad_() for t in (hidden, weight))
    targets, given = targets.cuda(), {name: tensor.float().cuda() for name, tensor in given.items()}
    options = {"loss_type": loss_type, "rows": rows, "kl_coef": 0.1, "sampler_cap": 1.3, **WIDE, **constants(loss_type)}
    expected = linear_ppo_loss(hidden, weight, targets, **given, **options)  # compiles what there is to compile
    expected.loss.backward()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = linear_ppo_loss(hidden, weight, targets, **given, **options)
        ours.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(ours.loss, expected.loss)
