"""`fastalign bench tune`: the fastest tile sizes of the GPU kernels on this machine's GPU, kept in the user's table."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.cli.flags import Failure, UsageError, check_known, parse_argv, suggestion

if TYPE_CHECKING:
    from fastalign.ops.tuning import Outcome

HELP = """usage: fastalign bench tune [--kernels NAME ...] [--output FILE]

  Time the GPU kernels with the tile sizes in use and with others, on this machine's GPU; write the fastest to the
  user's table, which goes before the one that comes with fastalign, and print what changed. Takes some minutes. Other
  sizes may give a result other last bits; whatever they are, it depends on no other row.

  --kernels NAME ...
        fused_forward, row_kernels, live_matmul; by default all
  --dtypes NAME ...
        bfloat16, float16, float32; by default bfloat16. What is found for one 16-bit type is used for both
  --tokens N, --hidden_size N, --vocab N
        what is timed, by default 4096 tokens, hidden size 4096, a vocabulary of 131072
  --output FILE
        where to write, by default ~/.config/fastalign/tiles/<architecture>.json, the only place that is read
  --json
        print JSON instead of lines
"""
_FLAGS = ("kernels", "dtypes", "tokens", "hidden_size", "vocab", "output", "json")


def run(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    flags = parse_argv(argv)
    check_known(flags, _FLAGS, "bench tune")
    sizes = {name: _number(flags, name) for name in ("tokens", "hidden_size", "vocab") if name in flags}
    if flags.get("json"):
        raise UsageError(f"--json takes no value, got {' '.join(flags['json'])}")
    output = _output(flags)

    from fastalign.ops import tuning

    kernels = _words(flags, "kernels", tuning.KERNELS, tuning.KERNELS)
    dtypes = _words(flags, "dtypes", tuple(tuning.DTYPES), ("bfloat16",))
    device, arch, about = _device(output)
    shape = tuning.Shape(**{"n" if name == "tokens" else name: size for name, size in sizes.items()})
    timer, outcomes = tuning.timer_for(device), []
    for dtype in dtypes:
        for subject in tuning.subjects(device, shape, tuning.DTYPES[dtype], kernels):
            outcome = tuning.tune(subject, timer)
            outcomes.append(outcome)
            if "json" not in flags:
                print(_line(outcome), flush=True)
    path = output or tuning.user_table(arch)
    tuning.write_table(path, f"{about}, {shape.n} x {shape.hidden_size} x {shape.vocab}", outcomes)
    if "json" in flags:
        print(json.dumps({"table": str(path), "subjects": [_facts(outcome) for outcome in outcomes]}, indent=2))
    else:
        print(f"written to {path}")


def _number(flags: dict[str, list[str]], name: str) -> int:
    text = " ".join(flags[name])
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"--{name} takes a positive number, got {text!r}")
    return int(text)


def _words(
    flags: dict[str, list[str]], name: str, known: tuple[str, ...], default: tuple[str, ...]
) -> tuple[str, ...]:  # fmt: skip
    words = flags.get(name, list(default))
    for word in words:
        if word not in known:
            raise UsageError(f"--{name}: unknown {word!r}{suggestion(word, known)}; there are {', '.join(known)}")
    if not words:
        raise UsageError(f"--{name} takes one or more of {', '.join(known)}")
    return tuple(words)


def _output(flags: dict[str, list[str]]) -> Path | None:
    if "output" not in flags:
        return None
    if len(flags["output"]) != 1:
        raise UsageError(f"--output takes one file, got {' '.join(flags['output']) or 'none'}")
    return Path(flags["output"][0])


def _device(output: Path | None) -> tuple[Any, str, str]:
    """The device that kernels run on, its architecture, and what the table says about where it comes from."""
    import torch

    from fastalign.ops import backends

    reason = backends.available()["triton"]
    if reason is not None:
        raise Failure(f"tile sizes are timed where kernels run, on a CUDA or ROCm device with triton: {reason}")
    import triton

    about = f"triton {triton.__version__}, {datetime.date.today()}"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return device, backends.architecture(device), f"Measured on {torch.cuda.get_device_name(device)}, {about}"
    if output is None:
        raise UsageError("kernels are interpreted here, which says nothing about a GPU: give an --output to try it out")
    device = torch.device("cpu")
    return device, backends.architecture(device), f"Interpreted, not measured, {about}"


def _facts(outcome: Outcome) -> dict[str, Any]:
    from dataclasses import asdict

    subject = outcome.subject
    return {
        "kernel": subject.kernel, "case": subject.case, "seconds_before": outcome.seconds,
        "seconds": outcome.chosen_seconds, "changes": outcome.changes, "tiles": asdict(outcome.chosen),
        "timed": 1 + len(subject.candidates) - len(outcome.refused),
        "refused": [{"tiles": asdict(tiles), "because": why} for tiles, why in outcome.refused.items()],
    }  # fmt: skip


def _line(outcome: Outcome) -> str:
    subject = outcome.subject
    tried = f"{1 + len(subject.candidates)} sizes"
    if outcome.refused:
        tried += f", {len(outcome.refused)} of them impossible here"
    where = f"{subject.kernel}, {subject.case}: {outcome.seconds * 1e3:.3f} ms"
    if not outcome.changes:
        return f"{where}, unchanged ({tried})"
    changes = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in outcome.changes.items())
    return f"{where} -> {outcome.chosen_seconds * 1e3:.3f} ms with {changes} ({tried})"
