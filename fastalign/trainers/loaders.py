"""The data loaders of a trainer: let go after their use, with workers that go on until the trainer has saved."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import seed_worker

from fastalign.trainers.checkpoints import CheckpointingTrainer
from fastalign.trainers.token_batches import token_dataloader

WorkerInit = Callable[[int], None]


class LoadingTrainer(CheckpointingTrainer):
    """A Trainer whose data loaders' workers obey nobody else, and which keeps no loader of an evaluation."""

    token_layout: str

    def get_train_dataloader(self) -> Any:
        """Trainer's, or one of batches of at most `max_tokens_per_batch` computed tokens."""
        with self._numbering():
            if self.args.max_tokens_per_batch is None:
                return super().get_train_dataloader()
            if self.train_dataset is None:
                raise ValueError("max_tokens_per_batch: there is no train_dataset to make batches of")
            data = self._remove_unused_columns(self.train_dataset, description="training")
            seeded = functools.partial(
                seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
            )
            return token_dataloader(
                data, self.data_collator, self.args, self.token_layout, self.accelerator, obeying(seeded)
            )

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        plain = getattr(loader, "base_dataloader", loader)
        plain.worker_init_fn = obeying(plain.worker_init_fn)
        if not kwargs.get("is_training"):  # accelerate keeps all it ever prepared, one for each evaluation of a run
            prepared = self.accelerator._dataloaders
            prepared[:] = [other for other in prepared if other is not loader]
        return loader


def obeying(then: WorkerInit | None = None) -> WorkerInit:
    """A loader's `worker_init_fn`, followed by `then`: the worker ends when the process it works for tells it to.

    A terminal sends Ctrl-C, torchrun, Slurm and service managers send SIGTERM to a whole group of processes. A worker
    that died of it would end the run at once (torch raises in the process that it worked for), where the step at hand
    is to be finished and saved. A worker whose process is gone leaves by itself after some seconds, as ever.
    """
    return functools.partial(_obey, then)


def _obey(then: WorkerInit | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # tells who sent it; macOS and Windows have none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, args=(parent.pid,), daemon=True).start()
    if then is not None:
        then(worker)


def _leave_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
