"""Write the table of docs/schedules.md from the planner: `python docs/make_schedules.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastalign.ops.plans import Plan
from fastalign.ops.schedule import Kernels, plan

PAGE = Path(__file__).with_name("schedules.md")
BEGIN = "<!-- plans: begin; written by docs/make_schedules.py -->"
END = "<!-- plans: end -->"

VOCAB = 131072
BOTH, FROZEN, NONE = (True, True, False), (True, False, False), (False, False, False)
CALLS: dict[str, tuple[dict[str, Any], tuple[float | None, float | None]]] = {  # budgets in GB at 8192 and 32768 rows
    "log-probs without gradient": ({"needs": NONE}, (None, None)),
    "any loss, all rows wait": ({"schedule": "cached"}, (2.3, 9)),
    "loss by groups": ({"group_rows": 1}, (2.3, 4.4)),
    "frozen head": ({"needs": FROZEN}, (2.3, 4.4)),
    "any loss, least memory": ({"schedule": "deferred"}, (0.3, 1.1)),
    "any loss, some memory": ({"schedule": "deferred"}, (1, 4.4)),
}


def planned(n: int, H: int, gigabytes: float | None, **arguments: Any) -> Plan:
    """The plan of bfloat16 tensors on an H200, every row scored, with Triton's kernels."""
    return plan(
        n, H, VOCAB, dtype=torch.bfloat16, device_type="cuda", kernels=Kernels(forward=True, exponentials=True),
        gathered=False, workspace_bytes=None if gigabytes is None else int(gigabytes * 1e9), **arguments,
    )  # fmt: skip


def _cells(name: str, n: int, H: int, arguments: dict[str, Any], gigabytes: float | None) -> list[str]:
    found = planned(n, H, gigabytes, **{"needs": BOTH} | arguments)
    assert found.time is not None
    beside = (found.predicted_bytes - found.gradient_bytes) / 1e9
    return [
        name, f"{n} × {H}", f"`{found.schedule}`", f"{found.rows} × {found.slab}", f"{found.gemms:g}", f"{beside:.2f}",
        f"{1e3 * found.time.seconds:.1f}", f"{found.floor:.2f}",
    ]  # fmt: skip


def table() -> str:
    """One line for each call and size."""
    head = ["call", "rows × H", "schedule", "tile", "GEMMs", "GB beside gradients", "predicted ms", "÷ its GEMMs"]
    rows = [head, ["---"] * len(head)]
    for name, (arguments, budgets) in CALLS.items():
        for H in (2048, 4096):
            for n, gigabytes in zip((8192, 32768), budgets, strict=True):
                rows.append(_cells(name, n, H, arguments, gigabytes))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def page(text: str) -> str:
    """A page with its block made anew."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
