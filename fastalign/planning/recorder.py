"""What a computation would allocate and compute: every storage's birth and death, from tensors without memory.

    with FakeTensorMode(), Recorder() as recorder:
        model(input_ids=ids).loss.backward()
    recorder.peak, recorder.flops

Fake tensors carry shapes, dtypes and devices and run the real Python code, autograd included: what a layer saves for
the backward, what checkpointing computes again and what autocast copies come out as they will, whatever the model's
class, instead of being a formula for each. Only what a kernel allocates inside itself stays unseen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Event(NamedTuple):
    """Storage number `storage` is allocated with `size` bytes (above 0) or freed (minus what it had).

    Negative numbers mark what begins: FORWARD of a pass that a backward follows, BACKWARD, and neither (END_OF_PASS).
    """

    storage: int
    size: int


END_OF_PASS, FORWARD, BACKWARD = (Event(number, 0) for number in (-1, -2, -3))

WEIGHTS, COPIES = "weights", "copies"  # the second: weights in another precision, as autocast makes them
LIBRARIES = "libraries"
MODELS = (WEIGHTS, "critic", "reference", "rewards")  # the names under which weights are


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, _heads_of(query, key), _heads_of(query, value))


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, _heads_of(query, key), _heads_of(query, value))


def _heads_of(query: Tensor, tensor: Tensor) -> tuple[int, ...]:
    """The shape of keys or values that several query heads share, as if each had its own."""
    return tensor.shape[0], query.shape[1], *tensor.shape[2:]


# torch's counter knows the attention kernels of GPUs only
_FLOPS: dict[Any, Callable[..., int]] = dict(flop_registry) | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
_NARROW = (torch.bfloat16, torch.float16)
KERNELS, KERNEL_BYTES = 3, 250 * 1024  # that oneDNN compiles for a product in 16 bits, and keeps; counted on AVX-512


class Recorder(TorchDispatchMode):
    """Records what is allocated while it is active; tensors made before are not counted.

    events      in order, each storage under a number of its own
    names       of each storage: the phase that it was allocated in, COPIES for a cast of what belongs to one of MODELS,
                or what `rename` put in its place
    now, peak   bytes alive, and the most that were
    flops       floating-point operations of matrix products and attention by phase, 2 a multiply-add, as
                torch.utils.flop_counter counts them; causal attention counts in full
    narrow      matrix products of 16-bit tensors, each combination of shapes once, with the phase that it was first in

    kernels: compiled for each of these and kept, under the name LIBRARIES: on the CPU, not on a GPU.
    """

    def __init__(self, kernels: int = 0) -> None:
        super().__init__()
        self._kernels = kernels
        self.events: list[Event] = []
        self.names: list[str] = []
        self.flops: Counter[str] = Counter()
        self.narrow: dict[tuple[Any, ...], str] = {}
        self.now = self.peak = 0
        self._phase = ""
        self._live: dict[int, tuple[int, int]] = {}  # address of a storage -> its number and bytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside goes under this name."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def rename(self, tensors: Iterable[Tensor], name: str) -> None:
        """Put the storages of live tensors under another name."""
        for tensor in tensors:
            number, _ = self._live[tensor.untyped_storage()._cdata]
            self.names[number] = name

    def mark(self, event: Event) -> None:
        """Say what begins; see `Event`."""
        self.events.append(event)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops[self._phase] += formula(*args, **(kwargs or {}), out_val=out)
            self._note_product(func, args)
        name = COPIES if func is torch.ops.aten._to_copy.default and self._name(args[0]) in MODELS else self._phase
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), name)
        return out

    def _note_product(self, func: Any, args: tuple[Any, ...]) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if func._overloadpacket in _PRODUCTS and any(tensor.dtype in _NARROW for tensor in tensors):
            product = (func, *((tuple(tensor.shape), tensor.stride()) for tensor in tensors))
            if product not in self.narrow:
                self.narrow[product] = self._phase
                for _ in range(self._kernels):
                    self._allocate(KERNEL_BYTES, LIBRARIES)

    def _name(self, tensor: Tensor) -> str | None:
        found = self._live.get(tensor.untyped_storage()._cdata)
        return None if found is None else self.names[found[0]]

    def _add(self, storage: torch.UntypedStorage, name: str) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._live or not size:
            return
        self._live[address] = self._allocate(size, name), size
        weakref.finalize(storage, self._remove, address)

    def _allocate(self, size: int, name: str) -> int:
        """The number of a new storage."""
        number = len(self.names)
        self.names.append(name)
        self.events.append(Event(number, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        return number

    def _remove(self, address: int) -> None:
        number, size = self._live.pop(address)
        self.events.append(Event(number, -size))
        self.now -= size


def peak_by_name(events: Iterable[Event], names: list[str]) -> tuple[int, Counter[str]]:
    """The most bytes alive at any moment of a record, and how they are divided among the names of storages."""
    now = peak = 0
    alive: Counter[str] = Counter()
    at_peak: Counter[str] = Counter()
    rising = False
    for storage, size in events:
        if storage < 0:
            continue
        if size < 0 and rising and now > peak:
            peak, at_peak = now, alive.copy()
        rising = size > 0
        now += size
        alive[names[storage]] += size
    if now > peak:
        peak, at_peak = now, alive
    return peak, at_peak
