"""Digest of a model's tensors: SHA-256 over raw bytes, tensor by tensor, without copies of the model.

A tensor's digest covers its dtype, shape and bytes in row-major order; the digest of a model covers the sorted names
and digests. Tied weights are read once. PEFT's tensors are left out and its name components removed, so the base model
inside a PeftModel has the digest that it has alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastalign.reference.files import canonical_json, sha256

_CHUNK_BYTES = 1 << 26  # what is copied from a device, or made contiguous, at a time
# components that wrappers put into names: torch.compile, FSDP1, activation checkpointing
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer that the model computes with when its adapters are off, by the base model's own names.

    Buffers outside the state dict count too (a cast or edited `inv_freq` changes the forward), except the frequencies
    that dynamic RoPE rewrites in every forward, which `original_inv_freq` beside them stands for. Raises ValueError
    for adapters merged into the base weights, which can then not be told apart.
    """
    wrappers: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(f"adapters are merged into {name}: unmerge them, or merge_and_unload the model")
            wrappers[name] = "base_layer"
        elif isinstance(module, TrainableTokensWrapper):
            wrappers[name] = "token_adapter"  # which is a tuner layer around the embedding
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrappers[name] = "original_module"
    tensors = dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers(remove_duplicate=False))
    named = {base: tensor for name, tensor in tensors.items() if (base := _base_name(name, wrappers)) is not None}
    return {name: tensor for name, tensor in named.items() if not _rewritten_in_forward(name, named)}


def _base_name(name: str, wrappers: Mapping[str, str]) -> str | None:
    """`name` without the components that PEFT and other wrappers added; None for a tensor of an adapter."""
    path, kept = "", []
    for part in name.split("."):
        if (inner := wrappers.get(path)) is not None:
            if part != inner:
                return None
        elif part not in _WRAPPER_PARTS:
            kept.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def _rewritten_in_forward(name: str, named: Mapping[str, Tensor]) -> bool:
    prefix, _, leaf = name.rpartition(".")
    if not leaf.endswith("inv_freq") or leaf.endswith("original_inv_freq"):
        return False
    return f"{prefix}.{leaf.removesuffix('inv_freq')}original_inv_freq" in named


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of named tensors. Sharded ones (DTensor) are gathered one by one: every rank must call this.

    Raises ValueError naming the tensor that has no bytes (meta device) or is no tensor.
    """
    threads = min(8, os.cpu_count() or 1)
    digests: dict[tuple[object, ...], str] = {}
    with ThreadPoolExecutor(threads) as pool:  # hashlib and device copies release the GIL
        pending = {}
        for name, tensor in tensors.items():
            _check_readable(name, tensor)
            place = _place(tensor)
            if place not in pending and place not in digests:
                if isinstance(tensor, DTensor):  # a collective: in order, from this thread
                    digests[place] = tensor_digest(tensor.full_tensor())
                else:
                    pending[place] = pool.submit(tensor_digest, tensor)
        digests |= {place: future.result() for place, future in pending.items()}
    return sha256(canonical_json({name: digests[_place(tensor)] for name, tensor in tensors.items()}))


def tensor_digest(tensor: Tensor) -> str:
    """Hexadecimal SHA-256 of one tensor: dtype, shape, bytes. Of a subclass that wraps others (quantised): of those."""
    with torch.no_grad():
        hasher = hashlib.sha256()
        tensor = tensor.detach()
        hasher.update(canonical_json([str(tensor.dtype), list(tensor.shape)]))
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            inner = {name: tensor_digest(getattr(tensor, name)) for name in names}
            hasher.update(canonical_json([type(tensor).__qualname__, repr(context), inner]))
        else:
            for chunk in _chunks(tensor):
                hasher.update(chunk)
    return hasher.hexdigest()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, piece by piece, in host memory."""
    if tensor.numel() == 0:
        return
    items = tensor.view(-1) if tensor.is_contiguous() else tensor  # else slices of the first dimension are copied
    item_bytes = tensor.element_size() * tensor.numel() // len(items)
    step = max(1, _CHUNK_BYTES // item_bytes)
    for start in range(0, len(items), step):
        piece = items[start : start + step].contiguous().cpu()
        yield piece.view(-1).view(torch.uint8).numpy().data


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are one piece of memory seen in one way (tied weights)."""
    if isinstance(tensor, DTensor) or is_traceable_wrapper_subclass(tensor):
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_readable(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} in the state dict is a {type(tensor).__name__}, not a tensor, and cannot be hashed")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device (offloaded or not loaded) and has no bytes to hash")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.layout}; only strided tensors can be hashed")


def float_dtypes(tensors: Iterable[Tensor]) -> str:
    """The floating-point dtypes of a model's parameters in words, for people: 'bfloat16' or 'bfloat16+float32'."""
    floats = (t.dtype for t in tensors if isinstance(t, nn.Parameter) and t.is_floating_point())
    return "+".join(sorted({str(dtype).removeprefix("torch.") for dtype in floats}))
