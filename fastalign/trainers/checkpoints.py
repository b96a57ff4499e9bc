"""Checkpoints that are whole or not there, and the signals that ask for one; see `checkpoint_files` for the folders."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from fastalign.trainers.checkpoint_files import (
    UNFINISHED,
    CheckpointError,
    check_to_resume,
    clear_unfinished,
    finish_published,
    newest_whole,
    prune,
    publish,
    seal,
)
from fastalign.trainers.guarded import GuardedTrainer
from fastalign.trainers.stopping import StopWhenAsked, stop

logger = logging.get_logger(__name__)


class CheckpointingTrainer(GuardedTrainer):
    """A Trainer whose checkpoints are atomic, verified before one is resumed from, and saved when it is told to stop.

    `save_total_limit` deletes old ones after the new one is in place. The first SIGTERM or Ctrl-C ends training after
    the step at hand with a checkpoint (none with save_strategy="no"): train() then raises SystemExit with status 143,
    or KeyboardInterrupt; a second one is obeyed at once.
    """

    _writes_apart = False

    def write_run_files(self, folder: Path) -> None:
        """Add to a checkpoint what transformers does not keep; called in the processes that save."""

    # ---- saving

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writes_apart else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = self._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        staged, final = Path(root, UNFINISHED, name), Path(root, name)
        writes = self.args.should_save
        own_disk = self.args.local_process_index == 0  # of a machine, which may not share its folders with the others
        try:
            if writes or own_disk:
                clear_unfinished(Path(root))
            self.accelerator.wait_for_everyone()
            self._write_apart(model, trial, staged)
            self.accelerator.wait_for_everyone()  # each process has its random state in there
            for turn in (writes, own_disk and not writes):
                if turn and staged.exists():
                    seal(staged)
                    publish(staged, final)
                    best = self.state.best_model_checkpoint
                    prune(Path(root), self.args.save_total_limit, {final} | ({Path(best)} if best else set()))
                    clear_unfinished(Path(root))
                self.accelerator.wait_for_everyone()
        except Exception as error:
            clear_unfinished(Path(root))  # on a full disk it is in the way
            if not _of_writing(error):
                raise
            number = getattr(error, "errno", None) or errno.EIO
            what = f"{name} could not be written ({error}); the checkpoints before it are whole"
            raise OSError(number, what, root) from error
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _write_apart(self, model: nn.Module, trial: Any, staged: Path) -> None:
        root, self._writes_apart = self._get_output_dir(trial), True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_apart = False
        self._name_best(root)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # again, with the name of the best one
            self.write_run_files(staged)

    def _name_best(self, root: str) -> None:
        """Trainer looks for the best checkpoint where this one is being written."""
        best, strategies = self.state.best_global_step, (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if best and self.args.save_strategy in strategies:
            folder = os.path.join(root, f"checkpoint-{best}")
            if best == self.state.global_step or os.path.isdir(folder):
                self.state.best_model_checkpoint = folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writes_apart:  # else once it is in place
            super()._push_from_checkpoint(checkpoint_folder)

    # ---- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. resume_from_checkpoint: a folder, which is verified; True: the last whole one in output_dir.

        Raises CheckpointError (a ValueError) naming the file that is missing or not as it was written.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._verified(resume_from_checkpoint)
        stopping = next((c for c in self.callback_handler.callbacks if isinstance(c, StopWhenAsked)), None)
        if stopping is None:
            stopping = StopWhenAsked(self._agreed_signal)
            self.add_callback(stopping)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            stopping.request.leave()
        asked = stopping.stopped_by or stopping.request.signal  # the latter: too late to matter, not to be forgotten
        if asked is not None:
            stop(asked)
        return output

    def _agreed_signal(self, own: int | None) -> int | None:
        if self.accelerator.num_processes == 1:
            return own
        asked = torch.tensor([own == SIGTERM, own == SIGINT], dtype=torch.float32, device=self.args.device)
        terminated, interrupted = self._sum_over_processes(asked).tolist()
        return SIGTERM if terminated else SIGINT if interrupted else None

    def _verified(self, wanted: str | bool) -> str:
        """The checkpoint to resume from, read once on each machine. All processes return or raise the same."""

        named = wanted if isinstance(wanted, str | os.PathLike) else None

        def find() -> tuple[Path, list[str]]:
            root = Path(self.args.output_dir) if named is None else Path(named).parent
            if self.args.should_save:
                finish_published(root)
            if named is None:
                return newest_whole(root)
            warning = check_to_resume(Path(named))
            return Path(named), [warning] if warning else []

        folder, warnings = self._agreed_result(find)
        for warning in warnings:
            logger.warning("%s; going on from %s", warning, folder.name)
        return str(folder)

    def _load_best_model(self) -> None:
        if best := self.state.best_model_checkpoint:
            self._verified(best)
        super()._load_best_model()

    def _agreed_result(self, find: Callable[[], tuple[Path, list[str]]]) -> tuple[Path, list[str]]:
        found: list[tuple[Path | None, list[str], str | None]] = []
        if self.args.local_process_index == 0:
            try:
                found.append((*find(), None))
            except CheckpointError as error:
                found.append((None, [], str(error)))
        every = found if self.accelerator.num_processes == 1 else gather_object(found)
        if errors := [error for _, _, error in every if error is not None]:
            raise CheckpointError(errors[0])
        folders = sorted({str(folder) for folder, _, _ in every})
        if len(folders) != 1:
            raise CheckpointError(
                f"the machines of this run hold different checkpoints: {', '.join(folders)}; name one"
            )
        return Path(folders[0]), every[0][1]


def _of_writing(error: Exception) -> bool:
    """Whether it is a disk's doing: safetensors has an error of its own for it, torch writes its words into one."""
    torchs = ("PytorchStreamWriter", "inline_container", "iostream error")
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in torchs)
    return isinstance(error, OSError | SafetensorError)
