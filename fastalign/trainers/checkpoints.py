"""Checkpoints that are whole or not there, and the signals that ask for one; see `checkpoint_files` for the folders."""

from __future__ import annotations

import contextlib
import errno
import functools
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

from fastalign.trainers.async_saving import Background, GivenUpError, HostCopies, Write, deferred_files
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
    or KeyboardInterrupt; a second one is obeyed at once. With `async_save` a step waits for a copy of what is saved;
    the next save, the end of train() and errors wait for the files.
    """

    _writes_apart = False
    _saving: tuple[Path, Path] | None = None  # the checkpoint that may not be in place yet: where it is, and its place

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._copies, self._background = HostCopies(), Background()

    def write_run_files(self, folder: Path) -> None:
        """Add to a checkpoint what transformers does not keep; called in the processes that save."""

    # ---- saving

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writes_apart else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finish_saving()
        root = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = root / UNFINISHED / name, root / name
        try:
            if self.args.should_save or self._has_own_disk:
                clear_unfinished(root)
            self.accelerator.wait_for_everyone()
            files = self._write_apart(model, trial, staged)
            self.accelerator.wait_for_everyone()  # each process has its random state in there
            best = self.state.best_model_checkpoint
            keep = {final} | ({Path(best)} if best else set())
            complete = functools.partial(_complete, files, staged, final, self.args.save_total_limit, keep)
            if self.args.should_save and self.args.async_save:
                files[:] = [work for write in files for work in (self._background.look, write)]
                self._background.start(complete)
            elif self.args.should_save:
                complete()
        except Exception as error:
            if (explained := _explained(error, final)) is error:
                raise
            raise explained from error
        self._saving = (staged, final)
        if not self.args.async_save:
            self.finish_saving()

    @property
    def _has_own_disk(self) -> bool:
        """Whether this process is the first one of a machine, which may not share its folders with the others."""
        return self.args.local_process_index == 0

    def finish_saving(self) -> None:
        """With `async_save`: wait until the last checkpoint is in place. All processes at once.

        What went wrong with it is raised, in all of them.
        """
        if self._saving is None:
            return
        (staged, final), self._saving = self._saving, None
        error = self._background.wait()
        if isinstance(error, GivenUpError):
            logger.warning("%s was not written: %s", final.name, error)
            error = None
        self._raise_alike(error, final)
        self.accelerator.wait_for_everyone()
        if self._has_own_disk and not self.args.should_save and staged.exists():
            _complete([], staged, final, self.args.save_total_limit, {final})
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _raise_alike(self, error: Exception | None, final: Path) -> None:
        own = None if error is None else _explained(error, final)
        told = [] if own is None else [(getattr(own, "errno", None) or errno.EIO, str(own))]
        if self.args.async_save and self.accelerator.num_processes > 1:
            told = gather_object(told)
        if own is not None:
            raise own from (None if own is error else error)
        if told:
            raise OSError(*told[0])

    def _write_apart(self, model: nn.Module, trial: Any, staged: Path) -> list[Write]:
        """Write what is written while the step waits; returns what is left to do."""
        root, self._writes_apart = self._get_output_dir(trial), True
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(deferred_files(self._copies.take)) if self._defers else []
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writes_apart = False
            self._name_best(root)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))  # again, with the name of the best one
                self.write_run_files(staged)
        return files

    @property
    def _defers(self) -> bool:
        return self.args.async_save and self.args.should_save

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._gathered():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._gathered():
            super()._save_optimizer_and_scheduler(output_dir)

    def _gathered(self) -> contextlib.AbstractContextManager[None]:
        """Around what transformers saves of a sharded model, which it has gathered for that."""
        if self._defers and self._writes_apart and self.is_fsdp_enabled:
            return self._copies.of_gathered(self.model, self.optimizer)
        return contextlib.nullcontext()

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
        self.finish_saving()  # of a run before that was broken off
        if resume_from_checkpoint:
            resume_from_checkpoint = self._verified(resume_from_checkpoint)
        stopping = next((c for c in self.callback_handler.callbacks if isinstance(c, StopWhenAsked)), None)
        if stopping is None:
            stopping = StopWhenAsked(self._agreed_signal)
            self.add_callback(stopping)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self.finish_saving()
        except Exception as error:
            self._abandon(error)
            raise
        except BaseException:
            self._background.give_up()  # a second signal: after the file at hand the process may end
            raise
        finally:
            stopping.request.leave()
        asked = stopping.stopped_by or stopping.request.signal  # the latter: too late to matter, not to be forgotten
        if asked is not None:
            stop(asked)
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.finish_saving()  # the best model may be in there, and superfluous checkpoints are deleted
        return super()._finalize_training(*args, **kwargs)

    def _abandon(self, error: Exception) -> None:
        """A run ends with an error: what is being written is worth keeping, and nobody else is waited for."""
        if self._saving is not None:
            (_, final), self._saving = self._saving, None
            if (another := self._background.wait()) is not None:
                error.add_note(str(_explained(another, final)))

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
        found: list[tuple[Path | None, list[str], Exception | None]] = []
        if self._has_own_disk:
            try:
                found.append((*find(), None))
            except (CheckpointError, OSError) as error:
                found.append((None, [], error))
        every = found if self.accelerator.num_processes == 1 else gather_object(found)
        if errors := [error for _, _, error in every if error is not None]:
            raise errors[0]
        folders = sorted({str(folder) for folder, _, _ in every})
        if len(folders) != 1:
            raise CheckpointError(
                f"the machines of this run hold different checkpoints: {', '.join(folders)}; name one"
            )
        return Path(folders[0]), every[0][1]


def _complete(files: list[Write], staged: Path, final: Path, limit: int | None, keep: set[Path]) -> None:
    """Write what is left of a checkpoint, put it in place, and delete older ones."""
    files.reverse()
    while files:
        files.pop()()  # and the copy is given back
    seal(staged)
    publish(staged, final)
    prune(final.parent, limit, keep)
    clear_unfinished(final.parent)


def _explained(error: Exception, final: Path) -> Exception:
    """What is raised for a checkpoint that was not saved, whose remains are deleted: on a full disk they are in the
    way."""
    clear_unfinished(final.parent)
    if not _of_writing(error):
        return error
    number = getattr(error, "errno", None) or errno.EIO
    what = f"{final.name} could not be written ({error}); the checkpoints before it are whole"
    return OSError(number, what, str(final.parent))


def _of_writing(error: Exception) -> bool:
    """Whether it is a disk's doing: safetensors has an error of its own for it, torch writes its words into one."""
    torchs = ("PytorchStreamWriter", "inline_container", "iostream error")
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in torchs)
    return isinstance(error, OSError | SafetensorError)
