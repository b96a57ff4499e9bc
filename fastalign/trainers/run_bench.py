"""A few real steps of a run in a process of its own: peak memory and time, to hold against its plan."""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib
import json
import logging
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from fastalign.ops.workspace import free_workspace
from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.loading import load_tokenizer
from fastalign.trainers.phase_plan import PhasePlan
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.trainers.run_data import made_examples
from fastalign.trainers.run_plan import run_plan
from fastalign.trainers.run_settings import Planned, replace_fields
from fastalign.trainers.step_plan import RunPlan

_MARK = "FASTALIGN_STEP_BENCH "


class StepMeasurement(NamedTuple):
    """peak_bytes: most that the steps took beyond a process that has its libraries loaded and used (CPU: resident,
    CUDA: allocated); process_bytes: what that process takes; seconds: of each step, the first of which warms up."""

    peak_bytes: int
    process_bytes: int
    seconds: list[float]

    @property
    def step_seconds(self) -> float:
        """Median over all steps but the first."""
        later = sorted(self.seconds[1:] or self.seconds)
        return later[len(later) // 2]


def measure_steps(
    trainer: str, config_class: tuple[str, str], given: dict[str, Any], *, tokens: int | None = None, steps: int = 4,
    micro_batch_tokens: int | None = None, timeout: float = 3600.0,
) -> StepMeasurement:  # fmt: skip
    """Train `steps` steps on the heaviest batch of a run, with random weights, in a fresh process.

    trainer: class in fastalign.trainers; config_class: module and name; given: its fields, JSON-able. tokens: made
    sequences of so many tokens instead of the run's data. micro_batch_tokens: in place of the config's. Of PPO,
    rewards that are functions are left out: every completion gets the same number.

    Raises RuntimeError saying in a line why the process failed, its last words beside (`__notes__`); ValueError where
    peak memory cannot be read.
    """
    if not Path("/proc/self/clear_refs").exists() and not torch.cuda.is_available():
        raise ValueError("peak memory of a process on the CPU is read from /proc, which only Linux has")
    order = {
        "trainer": trainer, "config": list(config_class), "given": given, "tokens": tokens, "steps": steps,
        "micro_batch_tokens": micro_batch_tokens,
    }  # fmt: skip
    code = "from fastalign.trainers.run_bench import child; child()"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], input=json.dumps(order), capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the measured process took more than {timeout:g} seconds, and was stopped") from error
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    said = json.loads(found[-1].removeprefix(_MARK)) if found else {}
    if "failure" not in said and found:
        return StepMeasurement(**said)
    failure = RuntimeError(_why(done.returncode, said.get("failure", "without a word")))
    failure.add_note(done.stderr.strip()[-4000:])
    raise failure


def _why(status: int, failure: str) -> str:
    """In a line, why a process failed."""
    if status >= 0:
        return f"the measured process failed ({status}): {failure}"
    killed = f"the measured process was killed by {signal.Signals(-status).name}"
    return killed + (", as the system does where memory runs out" if -status == signal.SIGKILL else "")


# In the measured process ----------------------------------------------------------------------------------------------


def child() -> None:
    """Read an order from stdin, run it, print the measurement; or in a line why there is none."""
    order = json.loads(sys.stdin.read())
    try:
        said = _measure(order)._asdict()
    except Exception as error:
        traceback.print_exc()
        said = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(_MARK + json.dumps(said))
    sys.exit(1 if "failure" in said else 0)


def _measure(order: dict[str, Any]) -> StepMeasurement:
    logging.getLogger("fastalign").setLevel(logging.WARNING)
    module, name = order["config"]
    trainer_class = getattr(importlib.import_module("fastalign.trainers"), order["trainer"])
    with tempfile.TemporaryDirectory() as folder:
        config_class, given = getattr(importlib.import_module(module), name), order["given"]
        fields = given | _overrides(folder, order["steps"], config_class.__dataclass_fields__)
        if "precompute_ref_log_probs" in config_class.__dataclass_fields__ or given.get("reference_free") is False:
            fields["cache_dir"] = f"{folder}/cache"
        if (limit := order["micro_batch_tokens"]) is not None:
            fields |= {"micro_batch_tokens": limit, "memory_gb": None}
        args = config_class(**fields)
        plan = run_plan(args, tokens=order["tokens"])
        args.micro_batch_tokens = plan.micro_batch_tokens
        return _measured(plan, args, trainer_class)


def _overrides(folder: str, steps: int, fields: Container[str]) -> dict[str, Any]:
    """Of a run that is only measured, those that its config has."""
    given = {
        "output_dir": folder, "max_steps": steps, "save_strategy": "no", "eval_strategy": "no", "report_to": "none",
        "dataset_test_split": None, "train_sampling_strategy": "sequential", "disable_tqdm": True, "logging_steps": 1,
        "push_to_hub": False, "load_best_model_at_end": False, "total_episodes": None,
    }  # fmt: skip
    return {name: value for name, value in given.items() if name in fields}


def _measured(plan: RunPlan, args: TrainerConfig, trainer_class: Any) -> StepMeasurement:
    set_seed(args.seed)
    on_gpu = args.device.type == "cuda"
    tokenizer = _tokenizer(args)
    _warm_up(plan, args, trainer_class, tokenizer)
    _give_back()
    clock = _Clock(on_gpu)
    process = _status("VmRSS")
    trainer = _trainer(plan, args, trainer_class, tokenizer, plan.step_data(), callbacks=[clock])
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM") - process
    return StepMeasurement(peak, process, clock.seconds)


def _trainer(
    plan: RunPlan, args: TrainerConfig, trainer_class: Any, tokenizer: Any, rows: list[Any], *, tiny: bool = False,
    **given: Any,
) -> Any:  # fmt: skip
    """A trainer of random weights, whose every step is over `rows`. tiny: only the classes of the models count."""
    args = copy.copy(args)

    def model(planned: Planned) -> nn.Module:
        return _random_model((_tiny(planned[0]), planned[1]) if tiny else planned)

    if isinstance(plan, PhasePlan):
        assert isinstance(args, PPOConfig)
        rewards = [model(reward) for reward in plan.rewards]
        given |= {"reward_model": rewards or _same_reward}
        given |= {"value_model": None if plan.critic is None else model(plan.critic)}
        if plan.reference is not None and args.ref_model_name_or_path is not None:  # else the trainer makes a copy
            given["ref_model"] = model(plan.reference)
        args.reward_model_path = args.reward_funcs = args.reward_weights = None
        args.value_model_path = args.ref_model_name_or_path = None
        args.min_response_length = args.response_length
        rows = rows * args.max_steps
    else:
        args.per_device_train_batch_size, args.max_tokens_per_batch = len(rows), None
        rows = rows * (args.gradient_accumulation_steps * args.max_steps)
    return trainer_class(
        model=model((plan.config, plan.model)), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, **given,
    )  # fmt: skip


def _same_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def _tokenizer(args: TrainerConfig) -> Any:
    """The model's tokenizer, or one that only has a padding token, where none is there."""
    try:
        assert args.model_name_or_path is not None
        return load_tokenizer(None, args.model_name_or_path, args)
    except (OSError, ValueError):
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        words = {"<pad>": 0, "<eos>": 1}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
        )


def _random_model(planned: Planned) -> nn.Module:
    """A model of this config with random weights, as the run loads it, before any adapter."""
    config, settings = copy.deepcopy(planned[0]), planned[1]
    auto = AutoModelForCausalLM
    if settings.scalar:
        auto, config.num_labels, config.problem_type = AutoModelForSequenceClassification, 1, "regression"
    given = {} if settings.attn_implementation is None else {"attn_implementation": settings.attn_implementation}
    model: nn.Module = auto.from_config(config, dtype=settings.dtype, **given)
    return model


_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "num_hidden_layers": 1,
}  # fmt: skip


def _tiny(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    for name, value in _TINY.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config


def _warm_up(plan: RunPlan, args: TrainerConfig, trainer_class: Any, tokenizer: Any) -> None:
    """The run itself on models of its classes that are as small as can be: afterwards code, threads, libraries' buffers
    and the interpreter's objects are there, which no plan counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        small = replace_fields(args, output_dir=folder, max_steps=1, per_device_train_batch_size=1)
        if hasattr(small, "cache_dir"):
            small.cache_dir = f"{folder}/cache"
        if isinstance(small, PPOConfig):
            small.response_length, small.per_device_train_batch_size = 8, small.num_generations
        data, _ = made_examples(small, 16, 1)
        _trainer(plan, small, trainer_class, tokenizer, data.to_list(), tiny=True).train()


def _status(name: str) -> int:
    """Bytes of this process by the kernel's account."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


class _Clock(TrainerCallback):
    """Seconds of each step; memory is counted from the first on."""

    def __init__(self, on_gpu: bool) -> None:
        self.seconds: list[float] = []
        self._on_gpu = on_gpu

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.seconds:
            self._restart()
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def _restart(self) -> None:
        """Forget what preparing the run took: reference log-probs, above all."""
        _give_back()
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _give_back() -> None:
    """Free what nobody uses, and give it back to the system."""
    gc.collect()
    free_workspace()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
