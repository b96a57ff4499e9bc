"""Trying a kernel out before it is relied on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(function: Callable[[], T]) -> T:
    """What `function` returns or raises, called in a thread of its own.

    Whether gradients are wanted, autocast, hooks on saved tensors (a checkpointed layer has them) and dispatch modes
    belong to a thread, so a trial in the midst of a forward neither sees nor disturbs those of the caller.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()
