"""`fastalign env`: what a bug report needs. Versions, devices, and each backend with the reason it cannot run."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastalign.cli.flags import UsageError, check_known, parse_argv

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "safetensors", "numpy", "flash-attn")

HELP = """usage: fastalign env [--json]

Print versions, devices and backends, and why a backend is unavailable.

  --json
        one JSON object instead of lines
"""


def run(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    flags = parse_argv(argv)
    check_known(flags, ["json"], "env")
    if flags.get("json"):
        raise UsageError(f"--json takes no value, got {' '.join(flags['json'])}")
    facts = environment()
    print(json.dumps(facts, indent=2) if "json" in flags else _lines(facts))


def environment() -> dict[str, dict[str, Any]]:
    """Sections of facts: versions, hardware, and for each backend None or the reason it cannot run."""
    import torch

    from fastalign.ops import backends

    cpu = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = {
        f"GPU {index}": f"{torch.cuda.get_device_name(index)}, {torch.cuda.mem_get_info(index)[1] / 2**30:.1f} GiB"
        for index in range(torch.cuda.device_count())
    }
    return {
        "versions": {
            "fastalign": _version("fastalign"),
            "Python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            "torch's CUDA": torch.version.cuda or torch.version.hip or "none (CPU build)",
        },
        "hardware": {"platform": platform.platform(), "CPU": cpu, **gpus},
        "backends": backends.available(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _lines(facts: dict[str, dict[str, Any]]) -> str:
    out = []
    for section, entries in facts.items():
        width = max(map(len, entries))
        out.append(section)
        for name, fact in entries.items():
            if section == "backends":
                fact = "available" if fact is None else f"unavailable: {fact}"
            out.append(f"  {name:{width}}  {fact}")
    return "\n".join(out)
