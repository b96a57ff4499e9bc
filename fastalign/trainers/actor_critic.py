"""A Trainer whose model is a policy and a critic: how they are optimised, saved and loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from fastalign.models.actor_critic import CRITIC_FOLDER, ActorCritic
from fastalign.trainers.base import FusedTrainer


class ActorCriticTrainer(FusedTrainer):
    """Saves the policy as transformers saves a model, the critic in critic/ or value_head.safetensors beside it.

    critic_learning_rate: of the critic's parameters, which are in optimizer groups of their own; None for the policy's.
    """

    def __init__(
        self, *args: Any, actor_critic: ActorCritic, critic_learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        self.actor_critic = actor_critic
        self._critic_learning_rate = critic_learning_rate
        super().__init__(*args, model=actor_critic, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's, with the critic's parameters in groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not fresh or not self.actor_critic.has_critic:
            return optimizer
        critic = set(map(id, self.actor_critic.critic_parameters()))
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in critic]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in critic]
                rate = self._critic_learning_rate or group["lr"]
                optimizer.add_param_group({**group, "params": own, "lr": rate, "initial_lr": rate})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy as transformers saves it, the critic beside it."""
        folder = output_dir or self.args.output_dir
        with self._as_model(self.actor_critic.policy):
            super()._save(folder)
        if self.args.should_save:
            self.actor_critic.save_critic(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        both = self.actor_critic
        super()._load_from_checkpoint(resume_from_checkpoint, both.policy)
        if both.critic is not None:
            folder = str(Path(resume_from_checkpoint) / CRITIC_FOLDER)
            if not Path(folder).is_dir():
                raise ValueError(
                    f"{resume_from_checkpoint} has no {CRITIC_FOLDER}/: it is not a checkpoint of this run"
                )
            Trainer._load_from_checkpoint(self, folder, both.critic)
        if both.value_head is not None:
            both.load_value_head(resume_from_checkpoint)

    @contextlib.contextmanager
    def _as_model(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` is what Trainer saves."""
        whole: Any = self.model
        self.model = model
        try:
            yield
        finally:
            self.model = whole
