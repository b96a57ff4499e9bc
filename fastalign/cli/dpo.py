"""`fastalign dpo`: from a configuration to a trained, saved and evaluated policy."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from fastalign.cli.flags import Raw, UsageError, collect, dataclass_field_names

if TYPE_CHECKING:
    from fastalign.trainers import DPOConfig, DPOTrainer

SUMMARY = "Train a policy on preference pairs with DPO or a relative, from cached reference log-probs."
CONFIG_CLASS = ("fastalign.trainers.dpo_config", "DPOConfig")
REQUIRED = {
    "model_name_or_path": "the policy that training starts from",
    "dataset_name": "the preference data",
    "output_dir": "the folder that the model is saved in",
}


def run(argv: list[str]) -> None:
    given = dpo_settings(argv, "dpo", SUMMARY, REQUIRED)
    if given is None:
        return
    resume = given.pop("resume_from_checkpoint", None)  # of this process, not of the run: it is not saved

    from fastalign.cli.settings import save
    from fastalign.trainers import DPOConfig

    config = DPOConfig(**given)
    show_log(config.process_index == 0)
    trainer = open_trainer(config)
    if config.should_save:
        save(DPOConfig, given, trainer.args.output_dir, "dpo")
    _train(trainer, resume)
    _finish(trainer)


def dpo_settings(argv: list[str], command: str, summary: str, required: dict[str, str]) -> dict[str, Any] | None:
    """The fields of DPOConfig that were given, typed; None after printing help. Names are checked before any import."""
    everything = "--help_all" in argv
    if everything or "--help" in argv or "-h" in argv:
        from fastalign.cli.settings import help_text
        from fastalign.trainers import DPOConfig

        print(help_text(DPOConfig, command, summary, everything=everything), end="")
        return None
    raw = collect(argv, _known_names(), command)
    for name, meaning in required.items():
        if name not in raw:
            raise UsageError(f"{name} is missing, {meaning}: give --{name}, or {name}: in the --config file")
    if "resume_from_checkpoint" in raw:
        raw["resume_from_checkpoint"] = _resume_text(raw["resume_from_checkpoint"])

    from fastalign.cli.settings import typed
    from fastalign.trainers import DPOConfig

    return typed(DPOConfig, raw)


def _known_names() -> frozenset[str]:
    names = dataclass_field_names(*CONFIG_CLASS)
    if names is None:  # the source is not as expected: the class itself tells, some seconds later
        from fastalign.cli.settings import config_fields
        from fastalign.trainers import DPOConfig

        names = frozenset(config_fields(DPOConfig))
    return names


def _resume_text(setting: Raw) -> Raw:
    """`--resume_from_checkpoint` alone, and `true` in YAML, mean the last checkpoint; its declared type is text."""
    if setting.value in (True, False):
        return setting._replace(value=str(setting.value).lower())
    return setting._replace(value=setting.value or ["true"]) if setting.words else setting


def open_trainer(config: DPOConfig) -> DPOTrainer:
    """A trainer of the model and data that `config` names."""
    from fastalign.trainers import DPOTrainer

    try:
        return DPOTrainer(args=config)
    except OSError as error:
        if error.errno is not None:  # a full disk, say
            raise
        names = [name for name in (config.model_name_or_path, config.ref_model_name_or_path) if name]
        # transformers' word for a model that is not there
        raise UsageError(f"cannot load {' or '.join(names)}: {' '.join(str(error).split())}") from error


def show_log(main_process: bool) -> None:
    """Progress of our own modules on stderr, from one process; warnings from all."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")  # torch's, on every CPU run
    logging.getLogger("fastalign").setLevel(logging.INFO if main_process else logging.WARNING)


def _train(trainer: DPOTrainer, resume: str | None) -> None:
    checkpoint: str | bool | None = {"true": True, "false": None}.get((resume or "false").lower(), resume)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        from transformers.trainer_utils import get_last_checkpoint

        last = get_last_checkpoint(trainer.args.output_dir)
        saved = (
            f"{last} is the last checkpoint: go on with --resume_from_checkpoint" if last else "nothing was saved yet"
        )
        raise KeyboardInterrupt(f"at step {trainer.state.global_step}; {saved}") from None
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)


def _finish(trainer: DPOTrainer) -> None:
    """Evaluate, unless the last step just was, and print what came of the run."""
    from fastalign.trainers.progress import evaluation_line

    lines = []
    if losses := [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]:
        lines.append("training loss: " + " → ".join(f"{loss:.4f} at step {step}" for step, loss in _ends(losses)))
    if trainer.eval_dataset is not None:
        metrics = _last_evaluation(trainer) or trainer.evaluate()
        trainer.save_metrics("eval", metrics, combined=False)
        lines.append(evaluation_line(trainer.state.global_step, metrics))
    report = trainer.reference_cache.report
    if report is not None:
        lines.append(
            f"reference log-probs: {report.cached} found, {report.computed} computed, in {trainer.reference_cache.path}"
        )
    lines.append(f"{trainer.state.global_step} steps; model and configuration are in {trainer.args.output_dir}")
    if trainer.is_world_process_zero():
        print("\n".join(lines))


def _ends(items: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return items if len(items) < 2 else [items[0], items[-1]]


def _last_evaluation(trainer: DPOTrainer) -> dict[str, Any] | None:
    """The metrics of an evaluation at the very last step, if there was one over a single data set."""
    if isinstance(trainer.eval_dataset, dict):
        return None
    for entry in reversed(trainer.state.log_history):
        if entry.get("step") == trainer.state.global_step and "eval_loss" in entry:
            return entry
    return None
