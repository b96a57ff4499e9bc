"""`fastalign bench step`: a few real steps of a run, beside what was planned for them; `bench tune`: cli/tune.py."""

from __future__ import annotations

import json

from fastalign.cli.flags import Failure, UsageError, suggestion
from fastalign.cli.plan import OWN_FLAGS, read_order

HELP = f"""usage: fastalign bench step --config FILE.yaml [--NAME VALUE ...]
       fastalign bench tune [--kernels NAME ...] [--output FILE]

  tune: find the fastest tile sizes of the GPU kernels on this machine's GPU; `fastalign bench tune --help`.

  step: train a few steps with the settings of `fastalign dpo` (or sft, reward, pro, ppo) in a process of its own, with
  random weights of the model's shape and the heaviest batch of the data; print peak memory and time beside the plan.

{OWN_FLAGS}  --steps N
        steps to run, 4 by default; the first warms up
  --device NAME
        run on cpu or cuda; by default as the settings say
  --json
        print JSON instead of a table
"""
_ACTIONS = ("step", "tune")


def run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help") or argv == ["step", "-h"] or argv == ["step", "--help"]:
        print(HELP, end="")
        if not argv:
            raise UsageError(f"an action is needed: {', '.join(_ACTIONS)}")
        return
    action, *rest = argv
    if action not in _ACTIONS:
        raise UsageError(f"unknown action {action!r}{suggestion(action, _ACTIONS)}; there are {', '.join(_ACTIONS)}")
    if action == "tune":
        from fastalign.cli import tune

        return tune.run(rest)
    order = read_order(rest, ("trainer", "tokens", "steps", "device", "json"), "bench step")
    if order is None:
        return
    as_json, steps, device = order.switch("json"), order.number("steps", int) or 4, order.device
    if device is not None:
        _check_present(device)
        order.given["use_cpu"] = device == "cpu"
    plan = order.planned(order.made())

    from fastalign.trainers.run_bench import measure_steps

    try:
        found = measure_steps(
            order.command.trainer, order.command.config, order.given, tokens=order.number("tokens", int), steps=steps,
            micro_batch_tokens=plan.micro_batch_tokens,
        )  # fmt: skip
    except RuntimeError as error:
        raise Failure(str(error)) from error
    rate = plan.total_flops / found.step_seconds
    if as_json:
        print(json.dumps({"plan": plan.as_dict(), "measured": found._asdict(), "flops_per_second": rate}, indent=2))
        return
    ratio = plan.peak_bytes / found.peak_bytes
    print(
        f"{'':24}{'planned':>12}{'measured':>12}\n"
        f"{'peak memory, MiB':24}{plan.peak_bytes / 2**20:>12.1f}{found.peak_bytes / 2**20:>12.1f}   "
        f"planned / measured {ratio:.3f}\n"
        f"{'work, GFLOP':24}{plan.total_flops / 1e9:>12.1f}\n"
        f"{'time of a step, s':24}{'':12}{found.step_seconds:>12.3f}   {rate / 1e9:.1f} GFLOP/s\n"
        f"the process itself takes {found.process_bytes / 2**20:.0f} MiB beside that"
    )


def _check_present(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device 'cuda': this machine has no GPU to measure on; `fastalign plan --device cuda` plans for one"
        )
