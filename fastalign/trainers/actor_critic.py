"""A Trainer whose model is a policy and a critic: how they are optimised, saved and loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastalign.models.actor_critic import CRITIC_FOLDER, VALUE_HEAD_FILE, ActorCritic
from fastalign.models.checkpoints import load_renamed_weights
from fastalign.models.sharding import whole
from fastalign.trainers.base import STATE_FILE, FusedTrainer
from fastalign.trainers.resharding import is_of_sharded_run
from fastalign.types import Metric


class ActorCriticTrainer(FusedTrainer):
    """Saves the policy as transformers saves a model, the critic in critic/ or value_head.safetensors beside it.

    Gradients of a critic of its own are clipped apart from the policy's: its errors, large at first, do not scale the
    policy's step. A value head shares the policy's trunk and is clipped with it.

    critic_learning_rate: of the critic's parameters, which are in optimizer groups of their own; None for the policy's.
    """

    model: Any

    def __init__(
        self, *args: Any, actor_critic: ActorCritic, critic_learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        if critic_learning_rate is not None and (kwargs.get("optimizers") or (None,))[0] is not None:
            raise ValueError("critic_learning_rate has no effect on an optimizer that is given; set it in there")
        self.actor_critic = actor_critic
        self._critic_learning_rate = critic_learning_rate
        super().__init__(*args, model=actor_critic, **kwargs)

    # ---- optimising

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

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip to max_grad_norm; returns the policy's norm before."""
        if self.actor_critic.critic is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        limit = self.args.max_grad_norm
        norm = whole(nn.utils.clip_grad_norm_(self.actor_critic.critic.parameters(), limit))
        self._train_meter.update({"val/critic_grad_norm": Metric(norm.detach(), torch.ones_like(norm))})
        return whole(nn.utils.clip_grad_norm_(self.actor_critic.policy.parameters(), limit))

    # ---- saving and loading

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as transformers saves it, tokenizer and critic beside it; see `merge_adapter` for `merged/`."""
        with self._as_model(self.actor_critic.policy):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder, both = output_dir or self.args.output_dir, self.actor_critic
        with self._as_model(both.policy):
            super()._save(folder, state_dict)
        critic_state = None
        if self.is_fsdp_enabled and both.critic is not None:  # gathered by all processes, for the one that writes
            critic_state = self.accelerator.get_state_dict(both.critic)
        both.save_critic(folder, critic_state=critic_state, writes=self.args.should_save)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, of the policy."""
        with self._as_model(self.actor_critic.policy):
            super().create_model_card(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise ValueError(
                f"{folder} has no {STATE_FILE}, which holds what a run carries beside its weights: it is not a "
                "checkpoint of such a run"
            )
        self._check_critic(folder)
        if self.is_fsdp_enabled or is_of_sharded_run(folder):  # one file holds both
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._as_model(self.actor_critic.policy):
            super()._load_from_checkpoint(resume_from_checkpoint, self.actor_critic.policy)
        self._load_critic(folder)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
            return
        with self._as_model(self.actor_critic.policy):
            super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_critic(Path(self.state.best_model_checkpoint))

    def _check_critic(self, folder: Path) -> None:
        """Raise ValueError for a checkpoint of a run with another kind of critic."""
        both = self.actor_critic
        own = {CRITIC_FOLDER: both.critic is not None, VALUE_HEAD_FILE: both.value_head is not None}
        for name, expected in own.items():
            if (folder / name).exists() != expected:
                found, has = ("has no", "has one") if expected else ("has a", "has none")
                raise ValueError(
                    f"{folder} {found} {name}, and this run {has}: resume with the advantage_estimator and value_head "
                    "of the first run"
                )

    def _load_critic(self, folder: Path) -> None:
        both = self.actor_critic
        if both.critic is not None:
            with self._as_model(both.critic):
                Trainer._load_from_checkpoint(self, str(both.critic_folder(folder)), both.critic)
            load_renamed_weights(both.critic, both.critic_folder(folder))
        if both.value_head is not None:
            both.load_value_head(folder)

    @contextlib.contextmanager
    def _as_model(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` is what Trainer saves and loads."""
        whole = self.model
        self.model = model
        try:
            yield
        finally:
            self.model = whole
