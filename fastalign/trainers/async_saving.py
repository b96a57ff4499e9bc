"""Files of a checkpoint that are written while training goes on, from copies in host memory.

transformers, peft and accelerate gather, name and split weights in one go with writing them. Inside `deferred_files`
they gather and name; what they would write is copied to the host and written later by the same functions, so that the
files are the same. The thread that writes touches nothing that training does.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import peft.peft_model
import safetensors.torch
import torch
import transformers.modeling_utils
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

Write = Callable[[], None]

# Where the functions are that write tensors. A version of these libraries that has one elsewhere writes such files at
# once, which is slower and no less right.
_WRITERS: tuple[tuple[ModuleType, str], ...] = (
    (torch, "save"),
    (safetensors.torch, "save_file"),
    (transformers.modeling_utils, "safe_save_file"),
    (peft.peft_model, "safe_save_file"),
)


class HostCopies:
    """Copies of what holds tensors, in host memory (pinned, for a GPU) that is kept from one checkpoint to the next:
    those of one have to be written before those of the next are taken."""

    def __init__(self) -> None:
        gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
            )
        )
        self._in_use: frozenset[int] | None = None

    def take(self, content: Any) -> Any:
        """A copy with the same structure; views of one storage stay so."""
        if self._in_use is None:
            return self._copy(content)
        return tree_map(lambda x: self._copy(x) if isinstance(x, Tensor) and self._is_used(x) else x, content)

    def _copy(self, content: Any) -> Any:
        staged: Any = self._stager.stage({"": content})
        return staged[""]

    def _is_used(self, tensor: Tensor) -> bool:
        assert self._in_use is not None
        return tensor.device.type != "cpu" or tensor.untyped_storage().data_ptr() in self._in_use

    @contextmanager
    def of_gathered(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """Inside, what is taken was gathered from the shards of model and optimizer: it is on the host already and
        nobody else's, but for what is not sharded."""
        state = [] if optimizer is None else tree_leaves(list(optimizer.state.values()))
        tensors = [*model.parameters(), *model.buffers(), *(x for x in state if isinstance(x, Tensor))]
        local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        self._in_use = frozenset(x.untyped_storage().data_ptr() for x in local)
        try:
            yield
        finally:
            self._in_use = None


@contextmanager
def deferred_files(copy: Callable[[Any], Any]) -> Iterator[list[Write]]:
    """Inside, what this thread would write by `torch.save` or safetensors' `save_file` is not written yet.

    copy: makes copies of what is to be written. Yields a list that fills with functions, each of which writes a file.
    What holds no tensors is small, and may change: it is written at once.
    """
    writes: list[Write] = []
    thread = threading.get_ident()

    def deferred(save: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(save)
        def later(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            is_path = isinstance(file, str | os.PathLike)
            holds = isinstance(content, dict) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(content))
            if threading.get_ident() == thread and is_path and holds:
                writes.append(functools.partial(save, copy(content), file, *args, **kwargs))
            else:
                save(content, file, *args, **kwargs)

        return later

    with ExitStack() as stack:
        for module, name in _WRITERS:
            if (save := getattr(module, name, None)) is not None:
                stack.enter_context(_named(module, name, deferred(save)))
        yield writes


@contextmanager
def _named(module: ModuleType, name: str, function: Callable[..., None]) -> Iterator[None]:
    former = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, former)


class GivenUpError(RuntimeError):
    """Nobody waits for the work any more."""


class Background:
    """One piece of work at a time, in a thread.

    The process lives until it is done: an interpreter that ends while a thread is in native code aborts. Work asks by
    `look` whether it was given up.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = threading.Event()

    def start(self, work: Callable[[], None]) -> None:
        """What was started before has to be waited for first."""
        assert self._thread is None
        self._given_up.clear()

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Until it is done; what it raised. A signal is still obeyed meanwhile."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error

    def give_up(self) -> None:
        self._given_up.set()

    def look(self) -> None:
        if self._given_up.is_set():
            raise GivenUpError("the run was broken off while this checkpoint was written")
