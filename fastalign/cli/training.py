"""What the training commands share: from a configuration to a trained, saved and evaluated model."""

from __future__ import annotations

import importlib
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.cli.flags import Failure, Raw, Stopped, UsageError, collect, dataclass_field_names

if TYPE_CHECKING:
    from fastalign.trainers.base import FusedTrainer
    from fastalign.trainers.config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingCommand:
    """`fastalign NAME`: a config class, a trainer, and the settings that must be given. Modules are named, not
    imported, so that help and typos are answered at once.
    """

    name: str
    summary: str
    config: tuple[str, str]  # module, class
    trainer: str  # class in fastalign.trainers
    required: dict[str, str]  # setting: what it is
    models: tuple[str, ...] = field(default=("model_name_or_path",))  # settings that name a model

    def run(self, argv: list[str]) -> None:
        given = self.settings(argv)
        if given is None:
            return
        resume = given.pop("resume_from_checkpoint", None)  # of this process, not of the run: it is not saved

        from fastalign.cli.settings import save

        config = self.config_class()(**given)
        show_log(config.process_index == 0)
        trainer = self.open_trainer(config)
        if config.should_save:
            save(self.config_class(), given, trainer.args.output_dir, self.name)
        _train(trainer, resume)
        _finish(trainer)

    def config_class(self) -> Any:
        module, name = self.config
        return getattr(importlib.import_module(module), name)

    def settings(
        self, argv: list[str], *, command: str | None = None, summary: str | None = None,
        required: dict[str, str] | None = None,
    ) -> dict[str, Any] | None:  # fmt: skip
        """The config's fields that were given, typed; None after printing help. Names are checked before any import."""
        command = command or self.name
        everything = "--help_all" in argv
        if everything or "--help" in argv or "-h" in argv:
            from fastalign.cli.settings import help_text

            print(help_text(self.config_class(), command, summary or self.summary, everything=everything), end="")
            return None
        raw = collect(argv, self._known_names(), command)
        for name, meaning in (self.required if required is None else required).items():
            if name not in raw:
                raise UsageError(f"{name} is missing, {meaning}: give --{name}, or {name}: in the --config file")
        if "resume_from_checkpoint" in raw:
            raw["resume_from_checkpoint"] = _resume_text(raw["resume_from_checkpoint"])

        from fastalign.cli.settings import typed

        return typed(self.config_class(), raw)

    def _known_names(self) -> frozenset[str]:
        names = dataclass_field_names(*self.config)
        if names is None:  # the source is not as expected: the class itself tells, some seconds later
            from fastalign.cli.settings import config_fields

            names = frozenset(config_fields(self.config_class()))
        return names

    def open_trainer(self, config: TrainerConfig) -> Any:
        """A trainer of the model and data that `config` names."""
        trainers = importlib.import_module("fastalign.trainers")
        try:
            return getattr(trainers, self.trainer)(args=config)
        except OSError as error:
            if error.errno is not None:  # a full disk, say
                raise
            given = [getattr(config, setting) for setting in self.models]
            names = [name for value in given for name in (value if isinstance(value, list) else [value]) if name]
            # transformers' word for a model that is not there
            raise UsageError(f"cannot load {' or '.join(names)}: {' '.join(str(error).split())}") from error


def _resume_text(setting: Raw) -> Raw:
    """`--resume_from_checkpoint` alone, and `true` in YAML, mean the last checkpoint; its declared type is text."""
    if setting.value in (True, False):
        return setting._replace(value=str(setting.value).lower())
    return setting._replace(value=setting.value or ["true"]) if setting.words else setting


def show_log(main_process: bool) -> None:
    """Progress of our own modules on stderr, from one process; warnings from all."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")  # torch's, on every CPU run
    logging.getLogger("fastalign").setLevel(logging.INFO if main_process else logging.WARNING)


def _train(trainer: FusedTrainer, resume: str | None) -> None:
    checkpoint: str | bool | None = {"true": True, "false": None}.get((resume or "false").lower(), resume)
    from fastalign.trainers.guards import BadStepError
    from fastalign.trainers.stopping import Terminated

    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"at step {trainer.state.global_step}; {_saved(trainer)}") from None
    except Terminated:
        raise Stopped(f"at step {trainer.state.global_step}; {_saved(trainer)}") from None
    except BadStepError as error:
        raise Failure(f"{error}. {_saved(trainer)}") from error
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)


def _saved(trainer: FusedTrainer) -> str:
    from fastalign.trainers.checkpoint_files import checkpoints

    found = checkpoints(Path(trainer.args.output_dir))
    last = found[-1] if found else None
    return f"{last} is the last checkpoint: go on with --resume_from_checkpoint" if last else "nothing was saved yet"


def _finish(trainer: FusedTrainer) -> None:
    """Evaluate, unless the last step just was, and print what came of the run."""
    from fastalign.trainers.progress import evaluation_line

    lines = []
    if losses := [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]:
        lines.append("training loss: " + " → ".join(f"{loss:.4f} at step {step}" for step, loss in _ends(losses)))
    if trainer.eval_dataset is not None:
        metrics = _last_evaluation(trainer) or trainer.evaluate()
        trainer.save_metrics("eval", metrics, combined=False)
        lines.append(evaluation_line(trainer.state.global_step, metrics))
    lines += trainer.summary_lines()
    lines.append(f"{trainer.state.global_step} steps; model and configuration are in {trainer.args.output_dir}")
    if trainer.is_world_process_zero():
        print("\n".join(lines))


def _ends(items: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return items if len(items) < 2 else [items[0], items[-1]]


def _last_evaluation(trainer: FusedTrainer) -> dict[str, Any] | None:
    """The metrics of an evaluation at the very last step, if there was one over a single data set."""
    if isinstance(trainer.eval_dataset, dict):
        return None
    for entry in reversed(trainer.state.log_history):
        if entry.get("step") == trainer.state.global_step and "eval_runtime" in entry:
            return entry
    return None
