"""`PPOConfig`: the settings of PPO training beside those that all trainers share."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from fastalign.losses import AGGREGATIONS, KL_ESTIMATORS
from fastalign.losses.policy_options import IMPORTANCE_SAMPLING_LEVELS, POLICY_LOSSES
from fastalign.losses.sampler import SAMPLER_CORRECTIONS
from fastalign.trainers.config import REFUSED, TrainerConfig, described
from fastalign.trainers.ppo_settings import (
    ADVANTAGE_ESTIMATORS,
    KL_CONTROLLERS,
    POLICY_UPDATES,
    check_ppo_settings,
    of_loss_type,
    take_defaults_of_loss_type,
)

DEFAULT_ROLLOUT_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}

logger = logging.getLogger(__name__)


@dataclass
class PPOConfig(TrainerConfig):
    """Settings of `PPOTrainer`: the names of TRL's former PPOConfig where it had one, over `TrainerConfig`.

    A *step*, in max_steps, logging_steps, save_steps and the learning-rate schedule, is one rollout phase with all its
    updates. A phase samples per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches completions
    in each process, and goes over them num_ppo_epochs times, with an optimizer step for each mini-batch of
    per_device_train_batch_size × gradient_accumulation_steps completions (of each process). loss_type stands for the
    options of a method; each can be given beside it (`losses.policy_options.POLICY_LOSSES`). learning_rate is 1e-6,
    adam_epsilon 1e-5 (arXiv 2403.17031).

    Raises ValueError, naming the field, what was given and what is accepted, for every value that cannot be honoured.
    """

    learning_rate: float = field(default=1e-6, metadata=described("Peak learning rate of the policy's AdamW."))
    adam_epsilon: float = field(default=1e-5, metadata=described("Epsilon of AdamW."))
    max_length: int | None = field(default=1024, metadata=described("Tokens of a prompt, without its completion."))

    # ---- models
    sft_model_path: str | None = field(default=None, metadata=described("TRL's name for model_name_or_path."))
    ref_model_name_or_path: str | None = field(
        default=None, metadata=described("Folder or hub name of the reference; by default the policy before training.")
    )
    reward_model_path: list[str] | None = field(
        default=None, metadata=described("Folders or hub names of reward models (classifiers with one label).")
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata=described("Python functions as package.module:name; see PPOTrainer.")
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=described("Weight of each reward model and function, in this order; by default 1.")
    )
    value_model_path: str | None = field(
        default=None,
        metadata=described(
            "Model the critic starts from. By default the (first) reward model if it shares the policy's tokenizer, "
            "else the policy with a new head."
        ),
    )
    value_head: bool = field(
        default=False, metadata=described("A value head on the policy's trunk instead of a critic of its own.")
    )

    # ---- rollouts
    total_episodes: int | None = field(
        default=None, metadata=described("Completions to train on in all, in place of max_steps or num_train_epochs.")
    )
    num_mini_batches: int = field(default=1, metadata=described("Mini-batches that a phase is cut into."))
    whole_groups: bool | None = field(
        default=None,
        metadata=described(
            "Whether a mini-batch has all completions of a prompt or none, as verl has it, so that they share the "
            "prompt's tokens. false draws single ones, as TRL's GRPO does. By default true where num_generations "
            "divides a mini-batch."
        ),
    )
    num_ppo_epochs: int = field(default=4, metadata=described("How often a phase's completions are gone over."))
    num_generations: int = field(default=1, metadata=described("Completions sampled for each prompt."))
    response_length: int = field(default=128, metadata=described("Tokens of a completion at most."))
    min_response_length: int = field(default=0, metadata=described("No stop token before so many tokens."))
    temperature: float = field(default=1.0, metadata=described("Sampling temperature, also inside the log-probs."))
    top_k: int = field(
        default=0, metadata=described("Sample from the k likeliest tokens; 0 is off, as ratios of log-probs want it.")
    )
    top_p: float = field(default=1.0, metadata=described("Nucleus sampling; 1 is off, as ratios of log-probs want it."))
    stop_token: str | None = field(
        default=None, metadata=described("Text of a further token that ends a completion; eos always does.")
    )
    stop_token_id: int | None = field(default=None, metadata=described("Id of a further token that ends a completion."))
    rollout_batch_tokens: int | None = field(
        default=None,
        metadata=described(
            "Tokens of one batch when completions are sampled and scored. By default "
            + ", ".join(f"{tokens} on {device}" for device, tokens in DEFAULT_ROLLOUT_BATCH_TOKENS.items())
            + "."
        ),
    )
    use_vllm: bool = field(default=False, metadata=described("Sample with vLLM, where it is installed."))

    # ---- rewards
    missing_eos_penalty: float | None = field(
        default=None, metadata=described("Taken off the score of a completion that did not end by itself.")
    )
    overlong_buffer: int | None = field(
        default=None,
        metadata=described(
            "Tokens before response_length over which a penalty on length rises from 0 to overlong_penalty (DAPO)."
        ),
    )
    overlong_penalty: float = field(
        default=1.0, metadata=described("Taken off the score of a completion of response_length tokens.")
    )
    normalize_scores: bool = field(
        default=False, metadata=described("Bring scores to mean 0 and deviation 1 of all scores so far.")
    )
    score_clip: float | None = field(default=None, metadata=described("Clip scores to ± this, after normalising."))
    mask_truncated_completions: bool = field(
        default=False,
        metadata=described("Do not train on completions that did not end by themselves; they are scored all the same."),
    )
    kl_coef: float | None = field(
        default=None, metadata=described("Weight of the reference KL in the token rewards. " + of_loss_type("kl_coef"))
    )
    kl_estimator: str = field(
        default="k1",
        metadata=described(
            "Estimator of that KL. Only k1 in the rewards has the KL's gradient; k2 and k3 are for comparison.",
            choices=tuple(KL_ESTIMATORS),
        ),
    )
    kl_controller: str = field(
        default="fixed", metadata=described("Whether kl_coef follows the measured KL.", choices=KL_CONTROLLERS)
    )
    target_kl: float | None = field(
        default=None, metadata=described("Nats per completion that the adaptive controller holds the KL at.")
    )
    kl_horizon: float = field(
        default=10000, metadata=described("Completions after which the adaptive controller has moved by exp(0.2).")
    )
    whiten_rewards: bool = field(
        default=False, metadata=described("Bring token rewards to deviation 1 over the rollout, keeping their mean.")
    )

    # ---- advantages
    advantage_estimator: str | None = field(
        default=None,
        metadata=described(
            "gae: with a critic; group: GRPO's; rloo: the mean of the others; reinforce: the return itself. "
            + of_loss_type("advantage_estimator"),
            choices=ADVANTAGE_ESTIMATORS,
        ),
    )
    gamma: float = field(default=1.0, metadata=described("Discount factor."))
    lam: float = field(default=0.95, metadata=described("GAE's lambda."))
    scale_rewards: bool | None = field(
        default=None, metadata=described("Divide group advantages by their deviation. " + of_loss_type("scale_rewards"))
    )
    filter_groups: bool = field(
        default=False,
        metadata=described(
            "Leave out the completions of a prompt that were all scored the same: they have no advantage, and do not "
            "count in a mean. DAPO's dynamic sampling, without sampling others in their place."
        ),
    )
    whiten_advantages: bool | None = field(
        default=None,
        metadata=described(
            "Bring advantages to mean 0 and deviation 1 over the rollout; by default for gae, reinforce."
        ),
    )

    # ---- losses
    loss_type: str = field(
        default="ppo",
        metadata=described(
            "The method, which is a set of defaults: of advantages, ratio, clip, aggregation and KL, as each says.",
            choices=tuple(POLICY_LOSSES),
        ),
    )
    policy_loss: str = field(
        default="clip",
        metadata=described(
            "What holds an update: the clip of loss_type; PPO's penalty or a TRPO step, for loss_type ppo.",
            choices=POLICY_UPDATES,
        ),
    )
    importance_sampling_level: str | None = field(
        default=None,
        metadata=described(
            "Whether a token's ratio is its own, that of its sequence (GSPO), or that with its own gradient "
            "(GSPO-token). " + of_loss_type("importance_sampling_level"),
            choices=IMPORTANCE_SAMPLING_LEVELS,
        ),
    )
    cliprange: float | None = field(
        default=None, metadata=described("How far the ratio may usefully move from 1. " + of_loss_type("cliprange"))
    )
    cliprange_high: float | None = field(
        default=None,
        metadata=described(
            "Its upper side, if another one (clip-higher); in cispo the cap of the ratio is 1 + this. By default "
            + ", ".join(
                f"{v.epsilon_high:g} in {n}" for n, v in POLICY_LOSSES.items() if v.epsilon_high != v.epsilon_low
            )
            + ", else cliprange."
        ),
    )
    dual_clip: float | None = field(
        default=None, metadata=described("Above 1: bounds the ratio where the advantage is negative. Not in cispo.")
    )
    sampler_correction: str | None = field(
        default=None,
        metadata=described(
            "Weigh each token's loss, or each sequence's, by how much likelier the trainer finds it than the sampler "
            "did: up to sampler_cap (truncate), or 0 above it (mask). For engines that compute in another way.",
            choices=SAMPLER_CORRECTIONS,
        ),
    )
    sampler_cap: float = field(default=2.0, metadata=described("The largest such weight."))
    penalty_coef: float = field(default=1.0, metadata=described("First coefficient of policy_loss penalty."))
    penalty_target: float = field(default=0.01, metadata=described("Nats per token at which that coefficient stays."))
    trpo_max_kl: float = field(default=0.01, metadata=described("Nats per token that a TRPO step may move."))
    kl_loss_coef: float | None = field(
        default=None, metadata=described("Weight of the reference KL in the loss. " + of_loss_type("kl_loss_coef"))
    )
    kl_loss_estimator: str = field(
        default="k3", metadata=described("Estimator of that KL; k1 has no gradient.", choices=tuple(KL_ESTIMATORS))
    )
    entropy_coef: float = field(default=0.0, metadata=described("Weight of the entropy bonus."))
    loss_aggregation: str | None = field(
        default=None,
        metadata=described(
            "How the tokens' losses become one. " + of_loss_type("loss_aggregation"), choices=AGGREGATIONS
        ),
    )
    vf_coef: float = field(default=0.1, metadata=described("Weight of the critic's loss."))
    cliprange_value: float | None = field(
        default=0.2, metadata=described("How far a value may usefully move in an update; null does not clip.")
    )
    critic_learning_rate: float | None = field(
        default=None, metadata=described("Peak learning rate of the critic; by default learning_rate.")
    )
    critic_warmup_steps: int = field(
        default=0, metadata=described("First steps, in which the critic alone is trained.")
    )
    token_metrics: bool = field(default=True, metadata=described("Also log the policy's entropy."))

    # ---- TRL's options that are not supported, with the one value each may have
    local_rollout_forward_batch_size: int | None = field(
        default=None, metadata=described(f"{REFUSED} rollout_batch_tokens bounds a batch.")
    )
    num_sample_generations: int = field(
        default=0, metadata=described(f"{REFUSED} evaluate() samples from the evaluation prompts.")
    )

    def __post_init__(self) -> None:
        if self.sft_model_path is not None:
            if self.model_name_or_path not in (None, self.sft_model_path):
                raise ValueError("sft_model_path and model_name_or_path name two policies; give one of them")
            self.model_name_or_path = self.sft_model_path
        for name in ("reward_model_path", "reward_funcs"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        super().__post_init__()
        take_defaults_of_loss_type(self)
        check_ppo_settings(self)
        if self.kl_estimator != "k1" and self.kl_coef:
            logger.warning(
                "kl_estimator=%s: in a reward it is a constant to the policy gradient, and of the three k1 alone "
                "leaves the gradient of the KL; use kl_loss_coef for a KL by another estimator", self.kl_estimator,
            )  # fmt: skip

    @property
    def epsilon_high(self) -> float | None:
        if self.cliprange_high is not None:
            return self.cliprange_high
        own = POLICY_LOSSES[self.loss_type]
        return self.cliprange if own.epsilon_high == own.epsilon_low else own.epsilon_high

    @property
    def max_completion_length(self) -> int | None:
        """The constant of loss_aggregation="constant"."""
        return self.response_length if self.loss_aggregation == "constant" else None

    @property
    def mini_batch_size(self) -> int:
        """Completions of an optimizer step, in each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def drawn_together(self) -> int:
        """Completions of a prompt that are in a mini-batch together: all of them, or 1."""
        whole = self.mini_batch_size % self.num_generations == 0 if self.whole_groups is None else self.whole_groups
        return self.num_generations if whole else 1

    @property
    def rollout_batch_size(self) -> int:
        """Completions of a phase, in each process."""
        return self.mini_batch_size * self.num_mini_batches

    @property
    def prompts_per_phase(self) -> int:
        """In each process."""
        return self.rollout_batch_size // self.num_generations

    @property
    def whitens_advantages(self) -> bool:
        if self.whiten_advantages is None:
            return self.advantage_estimator in ("gae", "reinforce")
        return self.whiten_advantages

    @property
    def needs_reference(self) -> bool:
        return bool(self.kl_coef or self.kl_loss_coef) or self.kl_controller != "fixed"
