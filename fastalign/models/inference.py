"""Running a model that is in training without disturbing it: to score with it, or to sample from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own mode again (`model.train()` would wake what was frozen in eval mode)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def inference(model: nn.Module, device: torch.device, *, autocast: torch.dtype | None = None) -> Iterator[None]:
    """No autograd, evaluation mode, autocast in that dtype or none at all, whatever the caller's. Afterwards every
    module's mode and the random state of the CPU and of `device` are as before."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"))
        stack.enter_context(torch.autocast(device.type, dtype=autocast, enabled=autocast is not None))
        stack.enter_context(evaluating(model))
        yield


def refuse_token_adapters(model: nn.Module) -> None:
    """Raise ValueError if an active adapter of a PeftModel adds tokens, or acts from a certain token on only."""
    if not isinstance(model, PeftModel):
        return
    for name in model.active_adapters:
        config = model.peft_config[name]
        from_token = getattr(config, "alora_invocation_tokens", None)
        if config.is_prompt_learning or config.is_adaption_prompt or from_token:
            kind = "activated LoRA" if from_token else config.peft_type.value
            raise ValueError(
                f"adapter {name!r} is {kind}, whose work depends on where the tokens of a prompt are: it can "
                "be neither sampled from nor scored here; use LoRA"
            )
