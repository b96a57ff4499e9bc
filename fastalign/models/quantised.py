"""4-bit layers of bitsandbytes on a CPU: kept in the format that gradients pass.

In evaluation mode, on CPUs with AVX512-BF16, `Linear4bit` repacks its weights for a faster kernel, for good, and that
kernel has no backward: a model that was evaluated once, or scored as its own reference, would go on training without
the gradients of all that lies below its first adapter. The layers' own switch prevents it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SWITCH = "support_avx512bf16_for_cpu"


def prevent_packing(model: nn.Module) -> list[nn.Module]:
    """Turn the switch off; returns the layers in which it was on, for `allow_packing`."""
    layers = [module for module in model.modules() if module.__dict__.get(_SWITCH)]
    for layer in layers:
        setattr(layer, _SWITCH, False)
    return layers


def allow_packing(layers: list[nn.Module]) -> None:
    for layer in layers:
        setattr(layer, _SWITCH, True)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode repacks nothing."""
    layers = prevent_packing(model)
    try:
        yield
    finally:
        allow_packing(layers)


def check_unpacked(model: nn.Module) -> None:
    """Raise ValueError for a layer that was repacked before: gradients would not pass it, and nothing would say so."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} was repacked by bitsandbytes for inference on this CPU, in a format that gradients do not "
                "pass, when the model ran in evaluation mode: load it again, and give it to fastalign first"
            )
