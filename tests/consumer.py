"""Someone else's code: checked in strict mode against the installed package, never run. See test_wheel.py."""

from typing import assert_type

import torch
from torch import Tensor

import fastalign
from fastalign import DPOConfig, DPOTrainer, LinearLogps, LossOutput, Metric, ReferenceCache, losses
from fastalign.ops import Plan, gae, plan
from fastalign.reference import TokenSequence

hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
targets = torch.zeros(2, 3, dtype=torch.int64)

scored = fastalign.linear_logps(hidden, weight, targets, entropy=True)
assert_type(scored, LinearLogps)
assert_type(scored.logps, Tensor)
assert_type(scored.entropy, Tensor | None)
ref_logps = fastalign.sequence_logps(scored.logps)
assert_type(ref_logps, Tensor)

out = fastalign.linear_dpo_loss(hidden, weight, targets, ref_logps=ref_logps, beta=0.1)
assert_type(out, LossOutput)
loss, metrics = out
assert_type(loss, Tensor)
assert_type(metrics, dict[str, Metric])
assert_type(losses.summarize(metrics), dict[str, Tensor])
assert_type(plan(1, 2, 3), Plan)
assert_type(gae(hidden[0], hidden[0], targets.bool()), tuple[Tensor, Tensor])

config = DPOConfig(output_dir="out", beta=0.2)
assert_type(config.beta, float)
trainer = DPOTrainer("model", args=config)
assert_type(trainer.args, DPOConfig)
cache = ReferenceCache.open("folder")
assert_type(cache, ReferenceCache)
assert_type(cache.missing([TokenSequence([1, 2], 1)]), list[int])

# What is wrong is found: an ignored error that is none would be an error itself.
fastalign.linear_logps(hidden, weight)  # type: ignore[call-arg]
fastalign.linear_dpo_loss(hidden, weight, targets, ref_logps=0.5)  # type: ignore[arg-type]
fastalign.linear_loss(None, hidden, weight, targets)  # type: ignore[arg-type]
fastalign.linear_lopps  # type: ignore[attr-defined] # noqa: B018
losses.dpo_los  # type: ignore[attr-defined] # noqa: B018
