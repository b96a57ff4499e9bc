"""`fastalign doctor`: does everything a run relies on hold, on this machine, model and data?"""

from __future__ import annotations

import json

from fastalign.cli.dpo import COMMAND
from fastalign.cli.flags import Failure, UsageError, parse_argv
from fastalign.cli.training import show_log

HELP = """usage: fastalign doctor --model_name_or_path MODEL [--config FILE.yaml] [--NAME VALUE ...]

  Check the identities that must hold before a run starts, on its own model, data and backends, with the settings of
  `fastalign dpo`: finite weights; hidden states through the head give the model's logits; every backend against
  float64; every schedule and token layout against each other; DPO's loss where policy and reference agree, PPO's where
  old and new policy do; GAE; the data's rows; the cache of reference log-probs, byte by byte. Nothing is trained.

  --pairs N
        run the model on the first N pairs of the data (default 4); without dataset_name they are random tokens
  --json
        print JSON instead of lines

  The exit status is 1 if a check fails. `fastalign doctor --help_all` lists the settings.
"""


def run(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    flags = parse_argv(argv)
    own = {name: flags.pop(name) for name in ("pairs", "json") if name in flags}
    rest = [word for name, words in flags.items() for word in (f"--{name}", *words)]
    required = {"model_name_or_path": COMMAND.required["model_name_or_path"]}
    given = COMMAND.settings(rest, command="doctor", summary="Check a run before it starts.", required=required)
    if given is None:
        return
    pairs = _pairs(own.get("pairs", ["4"]))
    if own.get("json"):
        raise UsageError(f"--json takes no value, got {' '.join(own['json'])}")

    from fastalign.doctor import FAILED, examine, render
    from fastalign.doctor.findings import as_dicts

    config = COMMAND.config_class()(**({"output_dir": "doctor", "report_to": "none"} | given))
    show_log(main_process=False)
    try:
        findings = list(examine(config, pairs=pairs))
    except OSError as error:
        if error.errno is not None:
            raise
        name = given["model_name_or_path"]  # transformers' word for a model that is not there
        raise UsageError(f"cannot load {name}: {' '.join(str(error).split())}") from error
    print(json.dumps(as_dicts(findings), indent=2) + "\n" if "json" in own else render(findings), end="")
    failed = sorted({finding.check for finding in findings if finding.status == FAILED})
    if failed:
        raise Failure(f"{', '.join(failed)}")


def _pairs(words: list[str]) -> int:
    text = " ".join(words)
    if len(words) != 1 or not text.isdigit() or int(text) < 1:
        raise UsageError(f"--pairs takes a positive number, got {text or 'none'}")
    return int(text)
