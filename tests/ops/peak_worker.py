"""The high-water mark of one call of the head, in a process of its own: `python peak_worker.py CASE RESULT`."""

import json
import sys
from pathlib import Path

import torch

from fastalign.ops import linear_logps, linear_loss, plan

case = json.loads(sys.argv[1])
n, H, V, dtype = case["n"], case["H"], case["V"], getattr(torch, case["dtype"])
half = case.get("ignored", False)


def call(n, V, case, measure=False):
    hidden = torch.randn(n, H, dtype=dtype).requires_grad_()
    weight = torch.empty(V, H, dtype=dtype).fill_(0.01).requires_grad_(case["weight"])
    targets = torch.randint(0, V, (n,))
    if half:
        targets[::2] = -100
    coef = (torch.rand(n) < case.get("live", 1.0)).float()
    before = 0
    if measure:
        Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark at what is resident now
        before = peak()
    if case["schedule"] == "streamed":
        loss = linear_loss(
            lambda s, cu, coef: -s.logps * coef,
            hidden,
            weight,
            targets,
            groups="tokens",
            inputs={"coef": coef},
            workspace_mb=case["workspace_mb"],
            schedule="streamed",
        ).loss
    else:
        out = linear_logps(hidden, weight, targets, schedule=case["schedule"], workspace_mb=case["workspace_mb"])
        loss = (out.logps * coef).sum()
    if loss.requires_grad:
        loss.backward()
    return peak() - before


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


call(64, 512, case)  # libraries allocate their own buffers at the first call
used = call(n, V, case, measure=True)
scored = (n + 1) // 2 if half else n
p = plan(
    scored,
    H,
    V,
    dtype=dtype,
    needs=(True, case["weight"], False),
    workspace_bytes=int(case["workspace_mb"] * 2**20),
    schedule=case["schedule"],
    group_rows=1 if case["schedule"] == "streamed" else None,
    num_tokens=n,
)
Path(sys.argv[2]).write_text(json.dumps({"used": used, "predicted": p.predicted_bytes, "plan": str(p)}))
