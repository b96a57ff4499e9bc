"""`fastalign cache build|inspect|verify`: reference log-probs on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

from fastalign.cli.dpo import COMMAND
from fastalign.cli.flags import Failure, UsageError, check_known, parse_argv, suggestion
from fastalign.cli.training import show_log

_BUILD_REQUIRED = {name: meaning for name, meaning in COMMAND.required.items() if name != "output_dir"}

HELP = """usage: fastalign cache build --config FILE.yaml [--NAME VALUE ...]
       fastalign cache inspect --cache_dir FOLDER
       fastalign cache verify --cache_dir FOLDER

  build
        compute the reference log-probs that `fastalign dpo` with the same settings will look up, and no
        others; what is there already is not computed again; `fastalign cache build --help` lists the settings
  inspect
        what a cache holds: references, rows, tokens, bytes
  verify
        read every byte of a cache and compare it with its checksum; the exit status is 1 if something is wrong
"""


def run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        if not argv:
            raise UsageError(f"an action is needed: {', '.join(_ACTIONS)}")
        return
    action, *rest = argv
    if action not in _ACTIONS:
        raise UsageError(f"unknown action {action!r}{suggestion(action, _ACTIONS)}; there are {', '.join(_ACTIONS)}")
    _ACTIONS[action](rest)


def _cache_dir(argv: list[str], action: str) -> str | None:
    """The folder that --cache_dir names; None after printing help."""
    if argv in (["-h"], ["--help"]):
        print(HELP, end="")
        return None
    flags = parse_argv(argv)
    check_known(flags, ["cache_dir"], f"cache {action}")
    folder = flags.get("cache_dir", [])
    if len(folder) != 1:
        raise UsageError(f"cache {action} needs one folder: --cache_dir FOLDER")
    return folder[0]


def _inspect(argv: list[str]) -> None:
    if (folder := _cache_dir(argv, "inspect")) is not None:
        from fastalign.reference import inspect, render_summary

        print(render_summary(inspect(folder)), end="")


def _verify(argv: list[str]) -> None:
    if (folder := _cache_dir(argv, "verify")) is not None:
        from fastalign.reference import render_problems, verify

        problems = verify(folder)
        print(render_problems(problems), end="")
        if problems:
            raise Failure(f"{folder} is damaged; `fastalign cache build` computes what is lost again")


def _build(argv: list[str]) -> None:
    summary = "Compute the reference log-probs that `fastalign dpo` looks up with the same settings."
    given = COMMAND.settings(argv, command="cache build", summary=summary, required=_BUILD_REQUIRED)
    if given is None:
        return

    with tempfile.TemporaryDirectory() as scratch:
        config = COMMAND.config_class()(**(given | {"output_dir": scratch, "push_to_hub": False, "report_to": "none"}))
        show_log(config.process_index == 0)
        cache = COMMAND.open_trainer(
            config
        ).reference_cache  # the trainer itself, so that it will ask for just these rows
    report = cache.report
    if report is not None and config.process_index == 0:
        print(
            f"{cache.path}: {report.cached} rows found, {report.computed} computed ({report.tokens} tokens) in"
            f" {report.seconds:.0f} s; reference {cache.reference[:16]}"
        )


_ACTIONS: dict[str, Callable[[list[str]], None]] = {"build": _build, "inspect": _inspect, "verify": _verify}
