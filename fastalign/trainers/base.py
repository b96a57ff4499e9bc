"""What the trainers share over transformers.Trainer: normalisation, micro-batches, metrics, saving."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from fastalign.models.causal import HeadFn
from fastalign.models.checkpoints import load_renamed_weights
from fastalign.models.layouts import TokenLayout, plan_layout, run_layout
from fastalign.trainers.batches import Batch, num_examples, split_batch
from fastalign.trainers.config import DEFAULT_MICRO_BATCH_TOKENS, TrainerConfig, by_device
from fastalign.trainers.export import save_merged
from fastalign.trainers.layouts import TokenCounter, choose_layout, throughput
from fastalign.trainers.loaders import LoadingTrainer
from fastalign.trainers.meters import Meter, standard_errors
from fastalign.trainers.progress import MetricsProgress
from fastalign.trainers.sharding import check_shardable
from fastalign.types import LossOutput, Metric

STATE_FILE = "fastalign_state.json"


class FusedTrainer(LoadingTrainer):
    """A Trainer for losses that are sums over items (pairs, tokens, ...) of padded batches; see `split_batch`.

    Subclasses give `batch_loss`, `num_items`, `columns` and `evaluation_data`. The loss of an optimizer step is the
    mean over all its items: of every micro-batch, accumulation step and process. How a batch was split changes neither
    loss nor gradient, beyond rounding. Metrics are weighted by the same counts, stay on the device and are fetched once
    per log line.
    """

    args: TrainerConfig
    loss_is_scaled_for_ga = True  # `batch_loss` divides by the items of the whole step
    columns: ClassVar[tuple[str, ...]]  # of an example that the collator reads

    def __init__(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        config: Any = getattr(model, "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(model, *args, **kwargs)
        if use_cache is not None:
            config.use_cache = use_cache  # Trainer turns it off, and it would be saved like that
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which would run nn.DataParallel: start one "
                "process per GPU (torchrun, accelerate launch), or show it one GPU with CUDA_VISIBLE_DEVICES"
            )
        if self.is_fsdp_enabled:
            check_shardable(model)
        if (shards := self.get_tp_size() * self.get_cp_size() * self.get_sp_size()) != 1:
            raise ValueError(f"tensor, context and sequence parallelism are not supported yet, got {shards} shards")
        given = self.args.micro_batch_tokens
        limit = None if given == "auto" else given  # until `_set_layout`
        self.micro_batch_tokens = by_device(limit, DEFAULT_MICRO_BATCH_TOKENS, self.args)
        self._chosen_size: tuple[int, int] | None = None  # micro_batch_tokens, and the bytes it was planned for
        self._train_meter, self._eval_meter = Meter(), Meter()
        self.token_layout = "padded"  # until `_set_layout`
        self._tokens = TokenCounter()  # of this process, since the last log
        self._total_tokens = 0.0  # of all processes, since training began
        self._clock: float | None = None
        self._stand_guard()
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(MetricsProgress)

    def batch_loss(self, model: nn.Module, batch: Batch, num_items: int | Tensor | None) -> LossOutput:
        """Loss of a batch, its sum over items divided by num_items (None: by its own items), and its metrics."""
        raise NotImplementedError

    def run_model(self, model: nn.Module, batch: Batch, head_fn: HeadFn | None = None, **model_kwargs: Any) -> Any:
        """One forward of a fused model in the run's layout; head_fn gets hidden (n, H) of the batch's rows."""
        layout = self._planned(batch, every_token=bool(model_kwargs.get("output_router_logits")))
        return run_layout(model, batch, layout, head_fn, **model_kwargs)

    def _planned(self, batch: Batch, *, every_token: bool = False, seen: int | None = None) -> TokenLayout | None:
        """The layout of a batch, whose tokens are counted if they are trained on; seen: as in `TokenCounter.add`."""
        layout = plan_layout(batch, self.token_layout, every_token=every_token)
        if torch.is_grad_enabled() and len(batch["rows"]) and self._counts:  # without rows it stands in for a batch
            useful, padded = int(np.sum(batch["lengths"])), batch["input_ids"].numel()
            computed, padding = (padded, padded - useful) if layout is None else (layout.computed, 0)
            self._tokens.add(useful, computed, padding, seen=seen)
        return layout

    def _set_layout(self, *models: nn.Module, **given: Any) -> None:
        """Settle how tokens go through the fused models, and how many at a time; see `choose_layout`, `choose_size`."""
        self.token_layout = choose_layout(models, self.args, **given)
        if self.args.micro_batch_tokens == "auto" and self.train_dataset is not None:
            from fastalign.trainers.auto_size import choose_size  # which knows all trainers

            self._chosen_size = choose_size(self)
            self.micro_batch_tokens = self._chosen_size[0]

    def num_items(self, batch: Batch) -> int:
        """What the loss of a batch is a mean over; by default its examples."""
        return num_examples(batch)

    def summary_lines(self) -> list[str]:
        """What the command line prints after a run, beside losses and metrics."""
        return []

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns, "row", self.args.length_column_name]

    # ---- the step

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int | Tensor | None:
        """Items of an optimizer step, over its accumulation steps and all processes."""
        items = sum(self.num_items(batch) for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return items
        return self.accelerator.reduce(torch.tensor(float(items), device=device), "sum")

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """Forward and backward of a device batch, in pieces of at most `micro_batch_tokens` computed tokens."""
        if self._clock is None:
            self._clock = time.perf_counter()
        pieces = self._pieces(inputs)
        total: Tensor | None = None
        for index, (piece, counts) in enumerate(pieces):
            with self._taking(counts, model, reduces=index == len(pieces) - 1 and self._ends_step()):
                loss = super().training_step(model, piece, num_items_in_batch)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _pieces(self, batch: Batch, examples: int | None = None) -> list[tuple[Batch, bool]]:
        """The batch in pieces of at most `micro_batch_tokens`, as `_alike` gives them."""
        return self._alike(self._own_pieces(batch, examples))

    def _own_pieces(self, batch: Batch, examples: int | None = None) -> list[Batch]:
        return split_batch(
            batch, self.micro_batch_tokens, layout=self.token_layout, examples=examples,
            multiple_of=self.args.pad_to_multiple_of,
        )  # fmt: skip

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        if return_outputs:
            raise ValueError("return_outputs=True: no logits exist to return")
        output = self.batch_loss(model, inputs, num_items_in_batch)
        if not self._counts:
            return output.loss * 0
        self._train_meter.update(output.metrics)
        # data parallelism averages gradients over processes, and the loss is already a share of the global mean
        return output.loss * self.accelerator.num_processes if num_items_in_batch is not None else output.loss

    # ---- evaluation

    def evaluation_data(self, dataset: Any, name: str) -> Any:
        """A data set handed to `evaluate`, as the collator takes it."""
        raise NotImplementedError

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics over the constructor's eval_dataset, one of its parts by name, or another data set (or a dict)."""
        own = (
            isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict) and eval_dataset in self.eval_dataset
        )
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self.evaluation_data(part, name) for name, part in eval_dataset.items()}
        elif eval_dataset is not None and not own:
            eval_dataset = self.evaluation_data(eval_dataset, "evaluate")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Adds a batch to the evaluation's metrics. The loss returned stands in for the one of `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        own = self._own_examples(num_examples(inputs))
        # a process without examples of its own takes part with weight zero, so that all report the same metrics
        for piece, counts in self._pieces(inputs, max(own, 1)):
            with self._taking(counts), torch.no_grad(), self.compute_loss_context_manager():
                output = self.batch_loss(model, piece, None)
            items = torch.full_like(output.loss, self.num_items(piece))
            metrics = {"loss": Metric(output.loss.detach() * items, items)} | output.metrics
            if own == 0 or not counts:
                metrics = {name: Metric(metric.total * 0, metric.weight * 0) for name, metric in metrics.items()}
            self._eval_meter.update(metrics)
        return torch.zeros((), device=self.args.device), None, None

    def _own_examples(self, examples: int) -> int:
        """How many of the last batch's are this process's: loaders fill it up with examples from the beginning."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return examples
        return min(max(state.remainder - self.accelerator.process_index * examples, 0), examples)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._eval_meter.clear()
        with self._evaluation(), self._clock_stopped():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        values, sums = self._eval_meter.values(self._sum_over_processes)
        values |= standard_errors(sums)
        output.metrics.pop(f"{metric_key_prefix}_loss", None)  # the stand-in
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        self._eval_meter.clear()
        return output

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        start = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{type(self).__name__} has no predictions to return: no logits exist; evaluate() gives metrics"
        )

    # ---- logging

    def _new_tokens(self) -> list[float]:
        """The counts of all processes since this was last asked; see `TokenCounter`."""
        wide = torch.float32 if self.args.device.type == "mps" else torch.float64
        counts = torch.tensor(self._tokens.take(), dtype=wide, device=self.args.device)
        found: list[float] = self._sum_over_processes(counts).tolist()
        self._total_tokens += found[0]
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_meter:
            values, _ = self._train_meter.values(self._sum_over_processes)
            self._train_meter.clear()
            seconds = None if self._clock is None else time.perf_counter() - self._clock
            logs |= values | throughput(self._new_tokens(), seconds)
            logs["num_tokens"] = self._total_tokens
            self._clock = None
        super().log(logs, start_time)

    # ---- saving and resuming

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside transformers' files, as JSON."""
        return {
            "num_tokens": self._total_tokens, "chosen_size": self._chosen_size, "guard": self.guard.state_dict()
        }  # fmt: skip

    def restore_run_state(self, state: dict[str, Any]) -> None:
        self._total_tokens = state["num_tokens"]
        if "guard" in state:  # checkpoints of earlier versions have none
            self.guard.load_state_dict(state["guard"])
        chosen, own = state.get("chosen_size"), self._chosen_size
        if chosen is not None and own is not None and chosen[1] == own[1]:  # another budget is another choice
            self._chosen_size = (chosen[0], chosen[1])
            self.micro_batch_tokens = chosen[0]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._new_tokens()  # counted, so that they are in the checkpoint
        super()._save_checkpoint(model, trial)
        self._clock = None

    def write_run_files(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(self.run_state()), encoding="utf-8")

    def _restore(self, checkpoint: str) -> None:
        file = Path(checkpoint) / STATE_FILE
        if file.is_file():
            self.restore_run_state(json.loads(file.read_text(encoding="utf-8")))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:  # which loads by itself
            self._restore(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_renamed(self.model, self.state.best_model_checkpoint)

    def _load_renamed(self, model: nn.Module, folder: str | Path) -> None:
        if not self.is_fsdp_enabled:  # which keeps a file under the modules' own names
            load_renamed_weights(model, folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model (or adapter), tokenizer, chat template and generation config; see `merge_adapter` for `merged/`."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save and getattr(self.args, "merge_adapter", False):
            folder = os.path.join(output_dir or self.args.output_dir, "merged")
            save_merged(self.accelerator.unwrap_model(self.model), folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
