"""Policy and critic as one module: one forward, one optimizer, one wrapper for several processes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastalign.models.causal import HeadFn, fuse_head
from fastalign.models.head import Head, base_causal_lm
from fastalign.models.scalar import base_scalar_model, fuse_scalar_head, scalar_head
from fastalign.models.sharding import whole

CRITIC_FOLDER = "critic"
VALUE_HEAD_FILE = "value_head.safetensors"


class ActorCritic(nn.Module):
    """A policy, and for advantages from values a critic: a scalar model of its own, or a head on the policy's trunk.

    policy: a transformers causal LM or a PeftModel around one; it is fused. critic: a scalar model, as of
    `load_scalar_model`, or None. value_head: instead, a linear layer on the policy's last hidden states, zero at first.
    """

    def __init__(self, policy: nn.Module, critic: nn.Module | None = None, *, value_head: bool = False) -> None:
        super().__init__()
        if critic is not None and value_head:
            raise ValueError("value_head=True stands in for a critic, and a critic was given too; give one of them")
        self.policy = fuse_head(policy)
        self.critic = None if critic is None else fuse_scalar_head(critic)
        self.value_head: nn.Linear | None = None
        if value_head:
            embedding = base_causal_lm(policy).get_input_embeddings().weight
            width = base_causal_lm(policy).config.get_text_config(decoder=True).hidden_size
            dtype = torch.promote_types(embedding.dtype, torch.float32)
            self.value_head = nn.Linear(width, 1, device=embedding.device, dtype=dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of decoder layers, which FSDP2 shards one by one; transformers' models have this too."""
        parts = (base_causal_lm(self.policy), None if self.critic is None else base_scalar_model(self.critic))
        return sorted({name for part in parts if part is not None for name in part._no_split_modules or ()})

    @property
    def has_critic(self) -> bool:
        return self.critic is not None or self.value_head is not None

    def critic_parameters(self) -> list[nn.Parameter]:
        """Those that only the values depend on."""
        return [p for module in (self.critic, self.value_head) if module is not None for p in module.parameters()]

    def forward(
        self,
        input_ids: Tensor,
        *,
        head_fn: HeadFn | None = None,
        rows: Tensor | np.ndarray | None = None,
        **tokens: Any,
    ) -> tuple[Any, Tensor | None]:
        """(what `head_fn(hidden, head)` makes of the policy's hidden states, values (n,) float32 at the rows).

        input_ids: (B, T), padded on the right. rows: flat indices b·T + t, or None for no values. A value is that of
        the state before the token at t + 1, so `rows` are those of the targets. tokens: what both models are told of
        the tokens beside (`position_ids`, `segments`, `attention_mask`).
        """
        if self.value_head is None or rows is None:
            out = None if head_fn is None else self.policy(input_ids=input_ids, head_fn=head_fn, **tokens)
            if rows is None or self.critic is None:
                return out, None
            return out, self.critic(input_ids=input_ids, rows=rows, **tokens)
        head_module, values = self.value_head, []
        index = torch.as_tensor(rows, device=input_ids.device)

        def both(hidden: Tensor, head: Head) -> Any:
            own = hidden[..., : head_module.in_features]  # an adapter on the head widens the hidden states
            with torch.autocast(own.device.type, enabled=False):
                picked = own.flatten(0, 1).index_select(0, index).to(head_module.weight.dtype)
                values.append(head_module(picked)[:, 0].float().clone())  # FSDP2 warns of views
            return None if head_fn is None else head_fn(hidden, head)

        return self.policy(input_ids=input_ids, head_fn=both, **tokens), values[0]

    # ---- what Trainer asks of a model

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self._call("activation_checkpointing_enable", **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self._call("gradient_checkpointing_enable", **kwargs)

    def _call(self, name: str, **kwargs: Any) -> None:
        for module in (self.policy, self.critic):
            if module is not None:
                method: Any = getattr(module, name)
                method(**kwargs)

    # ---- the critic on disk: the policy is saved as transformers saves it

    def critic_folder(self, folder: str | Path) -> Path:
        """Where in a policy's folder its critic is. An adapter lies one folder deeper: transformers takes an adapter in
        a folder beside a policy's for another one of the policy."""
        inner = Path(folder) / CRITIC_FOLDER
        return inner / "adapter" if isinstance(self.critic, PeftModel) else inner

    def save_critic(
        self, folder: str | Path, *, critic_state: dict[str, Tensor] | None = None, writes: bool = True
    ) -> None:
        """Beside the policy: a model in critic/, an adapter in critic/adapter/, or one file with the value head.

        critic_state: the gathered weights of a critic that is sharded over processes. writes: False where this process
        only takes part in gathering the value head.
        """
        if self.critic is not None and writes:
            base: Any = self.critic
            base.save_pretrained(str(self.critic_folder(folder)), state_dict=critic_state)
        if self.value_head is not None:
            state = {name: whole(tensor).contiguous() for name, tensor in self.value_head.state_dict().items()}
            if writes:
                save_file(state, str(Path(folder) / VALUE_HEAD_FILE))

    def load_value_head(self, folder: str | Path) -> None:
        """The value head that `save_critic` wrote into this folder."""
        assert self.value_head is not None
        self.value_head.load_state_dict(load_file(str(Path(folder) / VALUE_HEAD_FILE)))


def whole_model(model: nn.Module) -> nn.Module:
    """A scalar model with its adapter merged in, if it has one."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def scalar_model_from(policy: nn.Module) -> PreTrainedModel:
    """A scalar model with a copy of a causal LM's trunk (without adapters) and a new head of deviation 1/√(H + 1).

    For a policy that is in memory only; one with a name is loaded by `load_scalar_model`. Raises ValueError where
    transformers has no sequence classifier for the architecture.
    """
    base = base_causal_lm(policy)
    config = deepcopy(base.config)
    config.num_labels, config.problem_type, config.architectures = 1, "regression", None
    try:
        dtype = torch.promote_types(base.get_input_embeddings().weight.dtype, torch.float32)
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{type(base).__name__} has no sequence classifier in transformers to make a critic of") from (
            error
        )
    trunk = {
        name.replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in base.base_model.state_dict().items()
        if "lora_" not in name and ".modules_to_save." not in name
    }
    try:
        model.base_model.load_state_dict(trunk)
    except RuntimeError as error:  # a quantised trunk, say
        raise ValueError(f"no critic can be made of the {type(base).__name__} in memory: give value_model") from error
    head = scalar_head(model)
    with torch.no_grad():
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model.to(base.get_input_embeddings().weight.device)
