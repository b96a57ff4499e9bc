"""What a `PPOConfig` may say: its choices, and the values and combinations that are refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastalign.losses import KL_ESTIMATORS, check_policy_options
from fastalign.losses.policy_options import POLICY_LOSSES
from fastalign.losses.sampler import check_sampler_options

if TYPE_CHECKING:
    from fastalign.trainers.ppo_config import PPOConfig

ADVANTAGE_ESTIMATORS = ("gae", "group", "rloo", "reinforce")
"""Where advantages come from: a critic; the other answers to the prompt (GRPO, RLOO); the return itself."""
POLICY_UPDATES = ("clip", "penalty", "trpo")
KL_CONTROLLERS = ("fixed", "adaptive")

# Fields whose default is that of the loss type, and what they are called there.
OF_LOSS_TYPE = {
    "advantage_estimator": "advantage_estimator", "scale_rewards": "scale_rewards", "kl_coef": "kl_coef",
    "kl_loss_coef": "kl_loss_coef", "importance_sampling_level": "importance_sampling_level",
    "cliprange": "epsilon_low", "loss_aggregation": "aggregation",
}  # fmt: skip


def of_loss_type(name: str) -> str:
    """The defaults of a field by loss type, in words: the last, commonest one without names."""
    names: dict[str, list[str]] = {}
    for loss_type, variant in POLICY_LOSSES.items():
        names.setdefault(_plain(getattr(variant, OF_LOSS_TYPE[name])), []).append(loss_type)
    *rare, (commonest, _) = sorted(names.items(), key=lambda entry: len(entry[1]))
    return "By default " + "".join(f"{value} in {', '.join(types)}; " for value, types in rare) + f"else {commonest}."


def take_defaults_of_loss_type(config: PPOConfig) -> None:
    """Fill in what was not given. Raises ValueError for an unknown loss_type."""
    if config.loss_type not in POLICY_LOSSES:
        raise ValueError(f"loss_type={config.loss_type!r}: accepted are {', '.join(POLICY_LOSSES)}")
    for name, option in OF_LOSS_TYPE.items():
        if getattr(config, name) is None:
            setattr(config, name, getattr(POLICY_LOSSES[config.loss_type], option))


def _plain(value: str | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value


# What each choice leaves without effect.
_CRITICS = (
    "value_model_path", "value_head", "critic_warmup_steps", "critic_learning_rate", "vf_coef", "cliprange_value", "lam"
)  # fmt: skip
_UNUSED_BY_ESTIMATOR = {
    "gae": ("scale_rewards", "filter_groups"),
    "group": (*_CRITICS, "gamma"),
    "rloo": (*_CRITICS, "gamma", "scale_rewards"),
    "reinforce": (*_CRITICS, "scale_rewards", "filter_groups"),
}
_UNUSED = (
    "router_aux_loss_coef", "truncation_mode", "neftune_noise_alpha", "auto_find_batch_size", "torch_empty_cache_steps"
)  # fmt: skip
_PENALTY = ("penalty_coef", "penalty_target")
_CLIP = (
    "loss_type", "importance_sampling_level", "cliprange", "cliprange_high", "dual_clip", "sampler_correction",
    "kl_loss_coef", "entropy_coef",
)  # fmt: skip
_UNUSED_BY_LOSS = {
    "clip": (*_PENALTY, "trpo_max_kl"),
    "penalty": (*_CLIP, "trpo_max_kl"),
    "trpo": (*_CLIP, *_PENALTY, "loss_aggregation", "filter_groups", "mask_truncated_completions"),
}


def check_ppo_settings(config: PPOConfig) -> None:
    """Raise ValueError, naming the field, what was given and what is accepted, for what cannot be honoured."""
    _check_choices(config)
    _check_numbers(config)
    _check_combinations(config)
    _check_amounts(config)
    _check_effects(config)


def _check_choices(config: PPOConfig) -> None:
    check_policy_options(
        loss_type=config.loss_type, importance_sampling_level=config.importance_sampling_level,
        epsilon_low=config.cliprange, epsilon_high=config.epsilon_high, dual_clip=config.dual_clip,
        kl_coef=config.kl_loss_coef or 0.0, kl_estimator=config.kl_loss_estimator, entropy_coef=config.entropy_coef,
        aggregation=config.loss_aggregation, max_completion_length=config.max_completion_length,
    )  # fmt: skip
    for name, choices in (
        ("advantage_estimator", ADVANTAGE_ESTIMATORS),
        ("policy_loss", POLICY_UPDATES),
        ("kl_controller", KL_CONTROLLERS),
        ("kl_estimator", tuple(KL_ESTIMATORS)),
    ):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r}: accepted are {', '.join(choices)}")
    if config.sampler_correction is not None:
        check_sampler_options(config.sampler_correction, config.sampler_cap, has_sampler_logps=True)


def _check_numbers(config: PPOConfig) -> None:
    for name in ("num_mini_batches", "num_ppo_epochs", "num_generations", "response_length"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: it must be at least 1")
    for name in (
        "kl_coef", "vf_coef", "kl_loss_coef", "critic_warmup_steps", "min_response_length", "penalty_coef",
        "overlong_penalty",
    ):  # fmt: skip
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)}: it must be at least 0 and finite")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}={getattr(config, name)}: it must be in [0, 1]")
    positive = (
        "total_episodes", "temperature", "missing_eos_penalty", "score_clip", "target_kl", "kl_horizon",
        "cliprange_value", "critic_learning_rate", "rollout_batch_tokens", "penalty_target", "trpo_max_kl",
    )  # fmt: skip
    for name in positive:
        if (value := getattr(config, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: it must be positive")
    if config.overlong_buffer is not None and not 0 < config.overlong_buffer <= config.response_length:
        raise ValueError(
            f"overlong_buffer={config.overlong_buffer}: it must be positive and at most "
            f"response_length={config.response_length}"
        )


def _check_combinations(config: PPOConfig) -> None:
    if config.rollout_batch_size % config.num_generations:
        raise ValueError(
            f"num_generations={config.num_generations} does not divide the {config.rollout_batch_size} completions of "
            "a phase (per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches)"
        )
    if config.whole_groups and config.mini_batch_size % config.num_generations:
        raise ValueError(
            f"whole_groups=True: num_generations={config.num_generations} does not divide the {config.mini_batch_size} "
            "completions of a mini-batch (per_device_train_batch_size × gradient_accumulation_steps)"
        )
    if config.advantage_estimator in ("group", "rloo") and config.num_generations < 2:
        raise ValueError(
            f"advantage_estimator={config.advantage_estimator!r} compares the completions of a prompt: "
            f"num_generations={config.num_generations}, at least 2 are needed"
        )
    if config.kl_loss_coef and config.kl_loss_estimator == "k1":
        raise ValueError(
            "kl_loss_estimator='k1': its expected gradient on the policy's own samples is zero; take k3 or k2, or "
            "kl_coef, which puts the KL into the rewards"
        )
    if (config.kl_controller == "adaptive") != (config.target_kl is not None):
        raise ValueError("target_kl is what kl_controller='adaptive' aims at: give both or neither")
    if config.kl_controller == "adaptive" and not config.kl_coef:
        raise ValueError("kl_controller='adaptive' scales kl_coef, which must be positive to begin with")
    if config.policy_loss == "trpo":
        if config.world_size > 1:
            raise ValueError("policy_loss='trpo' is for small models and one process")
        if config.value_head:
            raise ValueError(
                "value_head=True trains the policy's trunk, which policy_loss='trpo' moves by its own step"
            )
    if config.stop_token is not None and config.stop_token_id is not None:
        raise ValueError("stop_token and stop_token_id name one token in two ways; give one of them")
    if config.value_head and config.value_model_path is not None:
        raise ValueError("value_head=True has no critic of its own, and value_model_path names one; give one of them")


def _check_amounts(config: PPOConfig) -> None:
    if config.total_episodes is not None and config.max_steps > 0:
        raise ValueError("total_episodes and max_steps both say when to stop; give one of them")
    episodes = config.rollout_batch_size * config.world_size
    if config.kl_controller == "adaptive" and not config.kl_horizon > 0.2 * episodes:
        raise ValueError(
            f"kl_horizon={config.kl_horizon}: one phase of {episodes} completions could take kl_coef to 0 or below; "
            f"it must exceed {0.2 * episodes:g}"
        )


def _check_effects(config: PPOConfig) -> None:
    """Refuse what was set and would be ignored."""
    without = {
        f"advantage_estimator={config.advantage_estimator!r}": _UNUSED_BY_ESTIMATOR[str(config.advantage_estimator)],
        f"policy_loss={config.policy_loss!r}": _UNUSED_BY_LOSS[config.policy_loss],
        "kl_controller='fixed'": ("kl_horizon",) if config.kl_controller == "fixed" else (),
        "kl_loss_coef=0": () if config.kl_loss_coef else ("kl_loss_estimator",),
        "kl_coef=0": () if config.kl_coef else ("kl_estimator",),
        "sampler_correction=None": () if config.sampler_correction else ("sampler_cap",),
        "num_generations=1": ("whole_groups",) if config.num_generations == 1 else (),
        "overlong_buffer=None": () if config.overlong_buffer else ("overlong_penalty",),
        "policy_loss='trpo' and no critic": (
            ("num_ppo_epochs",) if config.policy_loss == "trpo" and config.advantage_estimator != "gae" else ()
        ),
        "PPO": _UNUSED,
    }
    for cause, names in without.items():
        for name in names:
            default = type(config).__dataclass_fields__[name].default
            if name in OF_LOSS_TYPE:
                default = getattr(POLICY_LOSSES[config.loss_type], OF_LOSS_TYPE[name])
            if getattr(config, name) != default:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} has no effect with {cause}; accepted is {default!r}"
                )
    if getattr(config, "include_num_input_tokens_seen", "no") not in ("no", False):
        raise ValueError("include_num_input_tokens_seen is not supported: num_tokens is logged; accepted is 'no'")
    if config.max_tokens_per_batch is not None:
        raise ValueError(
            f"max_tokens_per_batch={config.max_tokens_per_batch} is not supported: how long completions will be is not "
            "known when a phase's prompts are drawn; set per_device_train_batch_size, and micro_batch_tokens for memory"
        )
    loader = config.accelerator_config
    for name, accepted in (("split_batches", False), ("even_batches", True), ("dispatch_batches", None)):
        if (value := getattr(loader, name, accepted)) != accepted:
            raise ValueError(f"accelerator_config {name}={value!r}: PPO takes {accepted!r} alone")
