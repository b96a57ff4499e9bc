"""`fastalign plan`: what a step of a run would take, before it runs. Also what `fastalign bench` plans."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastalign.cli.flags import UsageError, dataclass_field_names, parse_argv, suggestion
from fastalign.cli.training import TrainingCommand, show_log

if TYPE_CHECKING:
    from fastalign.planning import StepPlan
    from fastalign.trainers.step_plan import RunPlan

TRAINERS = ("dpo", "sft", "reward", "pro", "ppo")
DEVICES = ("cpu", "cuda")

OWN_FLAGS = """  --trainer NAME
        whose settings they are: dpo (default), sft, reward, pro or ppo
  --tokens N
        plan sequences of N tokens, half of them the prompt's, instead of the lengths of the data that dataset_name
        names; of a list there are four; of ppo's, response_length are the completion's
"""
HELP = f"""usage: fastalign plan --config FILE.yaml [--NAME VALUE ...]

  Predict the peak memory of a training step by part, and its work, from the settings of `fastalign dpo` (or sft,
  reward, pro, ppo). Of the models only config.json is read, of the data the lengths.

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
        if not 0 < value < float("inf"):
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

    @property
    def device(self) -> str | None:
        """What --device says."""
        if "device" not in self.own:
            return None
        device = self.word("device")
        if device not in DEVICES:
            raise UsageError(f"--device {device!r}{suggestion(device, DEVICES)}; accepted are {', '.join(DEVICES)}")
        return device

    @property
    def is_sized(self) -> bool:
        """Whether micro_batch_tokens is to be chosen."""
        return str(self.given.get("micro_batch_tokens")).lower() == "auto"

    @property
    def memory_gb(self) -> float | None:
        """GiB to choose it for, of the flag before the settings."""
        flag, setting = self.number("memory_gb", float), self.given.get("memory_gb")
        if setting is not None and not self.is_sized:
            raise UsageError(f"memory_gb={setting} has no effect without micro_batch_tokens=auto")
        return setting if flag is None else flag

    def made(self) -> RunPlan:
        """What the plans of this run are made from."""
        from fastalign.trainers.run_plan import run_plan

        tokens, device, _ = self.number("tokens", int), self.device, self.memory_gb
        args = self._config(device)
        show_log(args.process_index == 0)
        try:
            return run_plan(args, tokens=tokens, device_type=device)
        except ImportError as error:  # an optimizer's package, say
            raise UsageError(_line(error)) from error
        except OSError as error:
            if error.errno is not None:
                raise
            given = [self.given.get(setting) for setting in self.command.models]
            names = [name for value in given for name in (value if isinstance(value, list) else [value]) if name]
            # transformers' word for a model that is not there
            raise UsageError(f"cannot read the config of {' or '.join(names)}: {_line(error)}") from error

    def _config(self, device: str | None) -> Any:
        import torch

        from fastalign.trainers.run_settings import config_for

        fields = {"output_dir": "plan", "report_to": "none"} | self.given | {"memory_gb": None}
        if self.is_sized:
            fields["micro_batch_tokens"] = None
        config_class = self.command.config_class()
        try:
            return config_for(config_class, fields, device)
        except ValueError as error:
            if device is not None or torch.cuda.is_available():
                raise
            try:
                config_for(config_class, fields, "cuda")
            except ValueError:
                raise error from None
            raise UsageError(f"{_line(error)} This machine has no GPU; --device cuda plans for one.") from error

    def planned(self, made: RunPlan) -> StepPlan:
        """The plan of the run: of micro_batch_tokens as given, or as chosen."""
        if not self.is_sized:
            return made.plan()
        return made.auto(self.memory_gb, device_bytes(made.device_type))[1]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_order(argv: list[str], own: tuple[str, ...], command: str) -> Order | None:
    """The settings of a run, and the flags in `own`; None after printing help of the settings (`--help_all`)."""
    flags = parse_argv(argv)
    mine = {name: flags.pop(name) for name in own if name in flags}
    trainer = mine.get("trainer", ["dpo"])
    if len(trainer) != 1 or trainer[0] not in TRAINERS:
        name = " ".join(trainer)
        raise UsageError(f"--trainer {name!r}{suggestion(name, TRAINERS)}; accepted are {', '.join(TRAINERS)}")
    chosen: TrainingCommand = importlib.import_module(f"fastalign.cli.{trainer[0]}").COMMAND
    _refuse_misspelt(flags, own, chosen, command)
    rest = []
    for name, words in flags.items():
        rest += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    required = {"model_name_or_path": chosen.required["model_name_or_path"]}
    if "tokens" not in mine:
        required["dataset_name"] = "the data whose lengths are planned for (or give --tokens)"
    given = chosen.settings(rest, command=command, required=required)
    return None if given is None else Order(chosen, given, mine)


def _refuse_misspelt(flags: dict[str, list[str]], own: tuple[str, ...], chosen: TrainingCommand, command: str) -> None:
    """UsageError for a flag that is nearer to one of the command's own than to a setting."""
    settings = dataclass_field_names(*chosen.config) or frozenset()
    mine = (*own, "config", "help_all")
    for name in flags:
        if name in settings or name in mine or name.removeprefix("no_") in settings:
            continue
        nearest = suggestion(name, (*mine, *settings), "--")
        if any(nearest.endswith(f"--{own_name}?)") for own_name in mine):
            raise UsageError(f"unknown flag --{name}{nearest}; see `fastalign {command} --help`")


def run(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    order = read_order(argv, ("trainer", "tokens", "memory_gb", "device", "json", "brief"), "plan")
    if order is None:
        return
    as_json, brief = order.switch("json"), order.switch("brief")
    made = order.made()
    plan = order.planned(made)
    chosen: tuple[int, StepPlan] | None = None
    if order.is_sized:
        chosen = plan.micro_batch_tokens, plan
    elif order.memory_gb is not None or device_bytes(made.device_type) is not None:
        chosen = made.auto(order.memory_gb, device_bytes(made.device_type))
    alternatives = [] if brief else made.alternatives(plan)

    from fastalign.planning import render

    if as_json:
        found: dict[str, Any] = {"plan": plan.as_dict(), "alternatives": {n: p.as_dict() for n, p in alternatives}}
        if chosen is not None:
            found["auto"] = {"micro_batch_tokens": chosen[0], "plan": chosen[1].as_dict()}
        print(json.dumps(found, indent=2))
        return
    print(render(plan, alternatives), end="")
    if chosen is None:
        print("give --memory_gb to have micro_batch_tokens chosen")
    else:
        print(f"micro_batch_tokens {chosen[0]} would take {chosen[1].peak_bytes / 2**20:.1f} MiB")


def device_bytes(device_type: str) -> int | None:
    """All memory of this machine's GPU, where a run on one is planned."""
    import torch

    if device_type == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[1])
