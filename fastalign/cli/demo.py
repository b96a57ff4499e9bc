"""`fastalign demo`: length exploitation by DPO and its cure, on a built-in language; no download."""

from __future__ import annotations

from fastalign.cli.flags import collect
from fastalign.cli.settings import config_fields, help_text, typed

SUMMARY = (
    "Train a tiny model on a built-in language whose annotators are biased towards length, then DPO and "
    "length-penalised DPO from it; print what came of it and write a report, a plot and the models."
)


def run(argv: list[str]) -> None:
    from fastalign.demo.settings import DemoSettings

    if "--help" in argv or "-h" in argv:
        print(help_text(DemoSettings, "demo", SUMMARY), end="")
        return
    given = typed(DemoSettings, collect(argv, config_fields(DemoSettings), "demo"))
    DemoSettings(**given)  # refuses what makes no sense before torch is imported

    from fastalign.demo import run as run_demo

    run_demo(**given)
