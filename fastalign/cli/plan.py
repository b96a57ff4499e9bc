"""`fastalign plan`: what a step of a run would take, before it runs. Also what `fastalign bench` plans."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastalign.cli.flags import UsageError, parse_argv, suggestion
from fastalign.cli.training import TrainingCommand, show_log

if TYPE_CHECKING:
    from fastalign.trainers.run_plan import RunPlan

TRAINERS = ("dpo", "sft", "reward", "pro")
_DEVICES = ("cpu", "cuda")

OWN_FLAGS = """  --trainer NAME
        whose settings they are: dpo (default), sft, reward or pro
  --tokens N
        plan sequences of N tokens, half of them the prompt's, instead of the lengths of the data that dataset_name
        names; of a list there are four
"""
HELP = f"""usage: fastalign plan --config FILE.yaml [--NAME VALUE ...]

  Predict the peak memory of a training step by part, and its work, from the settings of `fastalign dpo` (or sft,
  reward, pro). Of the model only config.json is read, of the data the lengths.

{OWN_FLAGS}  --memory_gb GIB
        choose micro_batch_tokens for this much memory; by default nine tenths of the GPU's, on the CPU none is chosen
  --device NAME
        plan for cpu or cuda, whatever this machine has; by default as the settings say
  --json
        print JSON instead of a table
  --brief
        do not plan what other settings would take
"""


@dataclass(frozen=True)
class Order:
    """A run to plan: whose settings, those that were given, and the command's own flags."""

    command: TrainingCommand
    given: dict[str, Any]
    own: dict[str, list[str]]

    def number(self, name: str, kind: type[int] | type[float]) -> Any:
        """An own flag as a positive number; None where it was not given."""
        if name not in self.own:
            return None
        text = self.word(name)
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise UsageError(f"--{name} takes a positive number, got {text!r}")
        return value

    def word(self, name: str, default: str = "") -> str:
        words = self.own.get(name, [default])
        if len(words) != 1:
            raise UsageError(f"--{name} takes one value, got {' '.join(words) or 'none'}")
        return words[0]

    def switch(self, name: str) -> bool:
        if self.own.get(name):
            raise UsageError(f"--{name} takes no value, got {' '.join(self.own[name])}")
        return name in self.own

    def run_plan(self, **overrides: Any) -> RunPlan:
        """What the plans of this run are made from."""
        from fastalign.trainers.run_plan import run_plan

        device = self.word("device") or None
        if device is not None and device not in _DEVICES:
            raise UsageError(f"--device {device!r}{suggestion(device, _DEVICES)}; accepted are {', '.join(_DEVICES)}")
        fields = {"output_dir": "plan", "report_to": "none"} | self.given | overrides
        args = self.command.config_class()(**fields)
        show_log(args.process_index == 0)
        try:
            return run_plan(args, tokens=self.number("tokens", int), device_type=device)
        except OSError as error:
            if error.errno is not None:
                raise
            name = self.given["model_name_or_path"]  # transformers' word for a model that is not there
            raise UsageError(f"cannot read the config of {name}: {' '.join(str(error).split())}") from error


def read_order(argv: list[str], own: tuple[str, ...], command: str) -> Order | None:
    """The settings of a run, and the flags in `own`; None after printing help of the settings (`--help_all`)."""
    flags = parse_argv(argv)
    mine = {name: flags.pop(name) for name in own if name in flags}
    trainer = mine.get("trainer", ["dpo"])
    if len(trainer) != 1 or trainer[0] not in TRAINERS:
        name = " ".join(trainer)
        raise UsageError(f"--trainer {name!r}{suggestion(name, TRAINERS)}; accepted are {', '.join(TRAINERS)}")
    chosen: TrainingCommand = importlib.import_module(f"fastalign.cli.{trainer[0]}").COMMAND
    rest = []
    for name, words in flags.items():
        rest += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    required = {"model_name_or_path": chosen.required["model_name_or_path"]}
    if "tokens" not in mine:
        required["dataset_name"] = "the data whose lengths are planned for (or give --tokens)"
    given = chosen.settings(rest, command=command, required=required)
    return None if given is None else Order(chosen, given, mine)


def run(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    order = read_order(argv, ("trainer", "tokens", "memory_gb", "device", "json", "brief"), "plan")
    if order is None:
        return
    as_json, brief, memory = order.switch("json"), order.switch("brief"), order.number("memory_gb", float)
    made = order.run_plan()
    plan = made.plan()
    alternatives = [] if brief else made.alternatives()
    chosen = None
    device_bytes = _device_bytes(made.device_type)
    if memory is not None or device_bytes is not None:
        chosen, chosen_plan = made.auto(memory, device_bytes)

    from fastalign.planning import render

    if as_json:
        found: dict[str, Any] = {"plan": plan.as_dict(), "alternatives": {n: p.as_dict() for n, p in alternatives}}
        if chosen is not None:
            found["auto"] = {"micro_batch_tokens": chosen, "plan": chosen_plan.as_dict()}
        print(json.dumps(found, indent=2))
        return
    print(render(plan, alternatives), end="")
    if chosen is None:
        print("give --memory_gb to have micro_batch_tokens chosen")
    else:
        print(f"micro_batch_tokens {chosen} would take {chosen_plan.peak_bytes / 2**20:.1f} MiB")


def _device_bytes(device_type: str) -> int | None:
    """All memory of this machine's GPU, where a run on one is planned."""
    import torch

    if device_type == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[1])
