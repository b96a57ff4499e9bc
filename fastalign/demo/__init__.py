"""The embedded demonstration: length exploitation by DPO, and its cure, on a built-in language in about a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastalign.demo.settings import DemoSettings

if TYPE_CHECKING:
    from fastalign.demo.experiment import DemoResult, run

__all__ = ["DemoResult", "DemoSettings", "run"]


def __getattr__(name: str) -> Any:
    """`run` and `DemoResult` on first use: they bring torch and transformers, which `--help` can do without."""
    if name in ("DemoResult", "run"):
        from fastalign.demo import experiment

        return getattr(experiment, name)
    raise AttributeError(f"module 'fastalign.demo' has no attribute {name!r}")
