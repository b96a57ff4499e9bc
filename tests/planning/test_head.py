"""The planned head allocates what its plan says, when it says so."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign.models import Head
from fastalign.planning.head import HeadSettings, PlannedHead
from fastalign.planning.recorder import Recorder

N, H, V = 96, 64, 512


def passed(settings: HeadSettings, *, trains: bool = True, dtype: torch.dtype = torch.float32):
    """The plan and the most bytes beside the inputs of a forward and backward."""
    with FakeTensorMode(), Recorder() as recorder:
        hidden = torch.empty(N, H, dtype=dtype, requires_grad=True)
        weight = torch.empty(V, H, dtype=dtype, requires_grad=trains)
        inputs = recorder.now
        planned = PlannedHead(settings, recorder)
        loss = planned(N // 4)(hidden, Head(weight, None, 1.0, None))
        after_forward = recorder.now - inputs
        loss.backward()
        assert hidden.grad is not None
        assert (weight.grad is not None) == trains
    return planned.plans[0], recorder.peak - inputs, after_forward, recorder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("schedule", "streamed", "trains"),
    [("auto", True, True), ("streamed", True, True), ("streamed", True, False), ("deferred", False, True),
     ("overlaid", False, True), ("auto", False, False)],
)  # fmt: skip
def test_peak_is_the_plans(schedule, streamed, trains, dtype):
    settings = HeadSettings(device_type="cpu", streamed=streamed, schedule=schedule)
    plan, peak, _, recorder = passed(settings, trains=trains, dtype=dtype)
    # float32 accumulators and the 16-bit gradients made of them follow each other: never all of both
    slack = 0 if dtype == torch.float32 else plan.gradient_bytes
    assert plan.predicted_bytes - slack - 64 <= peak <= plan.predicted_bytes + 64, plan
    assert recorder.flops["head"] == int(plan.gemms * 2 * N * H * V)


def test_streamed_gradients_are_there_after_the_forward():
    streamed = passed(HeadSettings(device_type="cpu", schedule="streamed"))
    deferred = passed(HeadSettings(device_type="cpu", streamed=False, schedule="deferred"))
    assert streamed[2] >= streamed[0].gradient_bytes
    assert deferred[2] < deferred[0].workspace_bytes + 64


def test_single_tokens_are_groups():
    """A group of several tiles waits in part in the memory of the weight's gradient; a token never does."""
    by_group, by_token = (
        passed(HeadSettings(device_type="cpu", schedule="streamed", by_token=flag, workspace_mb=0.075))[0]
        for flag in (False, True)
    )
    assert by_group.rows < N // 4
    assert by_token.overlaid_rows == 0 < by_group.overlaid_rows
