"""What TRL computes: loss, gradient, importance weights, advantages, metrics (benchmarks/peers/trl_grpo_loss.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastalign.losses import ppo_loss, summarize
from fastalign.losses.sampler import sampler_weights
from fastalign.ops.advantages import group_advantages

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_grpo_loss.json").read_text())
LENGTHS = GOLDEN["inputs"]["lengths"]
MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def grid(rows):
    """(B, T) float32 with NaN beyond each completion."""
    return torch.full(MASK.shape, torch.nan).masked_scatter(MASK, torch.tensor([x for row in rows for x in row]))


def ours(settings):
    """TRL's settings in our names."""
    trl = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0} | settings
    options = {"loss_type": {"bnpo": "dapo"}.get(trl["loss_type"], trl["loss_type"])}  # of one batch they are the same
    level = trl.get("importance_sampling_level", "token")
    options |= {"importance_sampling_level": level, "kl_coef": trl["beta"], "dual_clip": trl.get("args.delta")}
    if trl["loss_type"] == "cispo":
        options["epsilon_high"] = trl["epsilon_high"] - 1  # TRL's is the cap itself
    else:
        options |= {name: trl[name] for name in ("epsilon_low", "epsilon_high")}
    if trl["loss_type"] == "dr_grpo":
        options["max_completion_length"] = GOLDEN["max_completion_length"]
    if trl.get("use_vllm"):
        options |= correction(settings) | {"sampler_logps": grid(GOLDEN["inputs"]["sampler_logps"])}
    return options


def correction(settings):
    return {
        "sampler_correction": settings["vllm_importance_sampling_mode"], "sampler_cap": GOLDEN["sampler_cap"]
    }  # fmt: skip


def advantages(settings):
    groups = torch.arange(len(LENGTHS)) // GOLDEN["num_generations"]
    scale = settings.get("scale_rewards") != "none"
    return group_advantages(torch.tensor(GOLDEN["inputs"]["rewards"]), groups, scale=scale)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_figures_of_trl(name):
    case = GOLDEN["cases"][name]
    settings, inputs = case["settings"], GOLDEN["inputs"]
    given = advantages(settings)
    torch.testing.assert_close(given, torch.tensor(case["advantages"]), rtol=1e-5, atol=1e-6)
    logps = grid(inputs["logps"]).requires_grad_()
    out = ppo_loss(
        logps, grid(inputs["old_logps"]), given[:, None].expand(MASK.shape), MASK, ref_logps=grid(inputs["ref_logps"]),
        **ours(settings),
    )  # fmt: skip
    assert float(out.loss.detach()) == pytest.approx(case["loss"], rel=2e-6, abs=1e-7)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    torch.testing.assert_close(gradient[MASK], grid(case["gradient"])[MASK], rtol=1e-5, atol=1e-7)
    found = {key: float(value) for key, value in summarize(out.metrics).items()}
    assert 0 < found["clip_fraction"] < 1
    logged = case["logged"]
    if settings["loss_type"] == "cispo":  # TRL counts those with a positive advantage alone
        assert found["clip_fraction/high"] >= logged["cispo_clip_ratio"] > 0
    elif "args.delta" not in settings:  # ours counts those beyond the dual clip too
        names = {"region_mean": "clip_fraction", "low_mean": "clip_fraction/low", "high_mean": "clip_fraction/high"}
        for trl, own in names.items():
            assert found[own] == pytest.approx(logged[f"clip_ratio/{trl}"], rel=1e-6), trl
    if settings.get("beta"):
        assert found["kl"] == pytest.approx(logged["kl"], rel=1e-5)
    if settings.get("use_vllm"):
        weights, metrics = sampler_weights(
            grid(inputs["old_logps"]), grid(inputs["sampler_logps"]), MASK, **correction(settings)
        )
        used = weights[MASK] if settings["vllm_importance_sampling_mode"].startswith("token") else weights[:, 0]
        for statistic in ("min", "mean", "max"):
            expected = logged[f"sampling/importance_sampling_ratio/{statistic}"]
            assert float(getattr(used, statistic)()) == pytest.approx(expected, rel=1e-5), statistic
        assert 0 < float(metrics["sampler_capped"].value) < 1


def test_the_figures_are_of_every_variant_that_trl_has():
    settings = [case["settings"] for case in GOLDEN["cases"].values()]
    assert {s["loss_type"] for s in settings} == {"grpo", "bnpo", "dr_grpo", "dapo", "cispo"}
    assert {s["vllm_importance_sampling_mode"] for s in settings if s.get("use_vllm")} == {
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    }  # fmt: skip
    assert GOLDEN["provenance"]["trl"] == "1.16.0"
