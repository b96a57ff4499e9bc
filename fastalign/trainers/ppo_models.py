"""The models and data of a PPO run from what was handed in: policy, reference, critic, rewards, sampler, prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastalign.data import CompletionCollator, DataReport, prepare_prompts
from fastalign.models import disable_dropout, load_causal_lm, load_scalar_model
from fastalign.models.actor_critic import ActorCritic, scalar_model_from
from fastalign.rollouts import Sampler, SamplingOptions, TransformersSampler
from fastalign.trainers.config import TrainerConfig, by_device
from fastalign.trainers.examples import Examples, padding_id
from fastalign.trainers.fisher import check_double_backward
from fastalign.trainers.loading import (
    adapter_base,
    add_adapter,
    autocast_dtype,
    check_trainable,
    load_model,
    loading_arguments,
    lora_config,
    prepare_checkpointing,
)
from fastalign.trainers.ppo_config import DEFAULT_ROLLOUT_BATCH_TOKENS, PPOConfig
from fastalign.trainers.ppo_rollout import PromptSet, ReadColumns
from fastalign.trainers.reference import list_lengths, reference_adapter
from fastalign.trainers.reward_functions import FunctionReward, RewardModel, Rewards, load_function


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompt data sets for a trainer."""

    examples: Examples
    _columns: dict[int, ReadColumns]

    def wrap(self, dataset: Dataset) -> PromptSet:
        return PromptSet(dataset, self._columns.get(id(dataset)))

    def training(self, dataset: Any) -> PromptSet | None:
        found = self.examples.training(dataset)
        return None if found is None else self.wrap(found)

    def evaluation(self, dataset: Any) -> dict[str, PromptSet]:
        return {name: self.wrap(part) for name, part in self.examples.evaluation(dataset).items()}


def prompt_sets(tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Prompts:
    """Prompts by a config's settings: prompt_ids, and the row's other columns on demand."""
    columns: dict[int, ReadColumns] = {}

    def tokenize(dataset: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, DataReport]:
        data = prepare_prompts(
            dataset, tokenizer, format=args.dataset_format, max_length=args.max_length,
            on_long_prompt=args.on_long_prompt, on_bad_row=args.on_bad_row, **options,
        )  # fmt: skip
        columns[id(data.dataset)] = data.columns
        return data.dataset, data.report

    collator = CompletionCollator(padding_id(tokenizer), pad_to_multiple_of=args.pad_to_multiple_of)
    lengths = lambda dataset: list_lengths(dataset, "prompt_ids")  # noqa: E731
    return Prompts(Examples(tokenizer, args, tokenize, ("prompt_ids",), lengths, collator), columns)


def build_policy(
    source: str | nn.Module, args: PPOConfig, quantization_config: Any, peft_config: PeftConfig | None
) -> tuple[nn.Module, Callable[[], tuple[nn.Module, str | None]]]:
    """(the policy as it trains, a function that gives the reference it starts from: model and active adapter).

    The reference is the policy without its new adapter where there is one, otherwise a frozen copy, made on request.
    """
    peft_config = lora_config(args, peft_config)
    policy = load_model(source, args, peft_config, quantization_config)
    if args.disable_dropout:
        disable_dropout(policy)
    adapter = reference_adapter(policy)

    def start() -> tuple[nn.Module, str | None]:
        own = peft_config is not None or (isinstance(policy, PeftModel) and adapter is None)
        return (trained, None) if own else (frozen(copy.deepcopy(policy)), adapter)

    trained = policy if peft_config is None else add_adapter(policy, peft_config, args)
    check_trainable(trained)
    if args.policy_loss == "trpo":
        check_double_backward(trained)
    prepare_checkpointing(trained, args)
    return trained, start


def build_reference(
    ref_model: str | nn.Module | None, args: PPOConfig, start: Callable[[], tuple[nn.Module, str | None]],
    quantization_config: Any,
) -> tuple[nn.Module, str | None] | None:  # fmt: skip
    """The model that the KL is to and the adapter that is on in it; None where the config asks for no KL."""
    given = args.ref_model_name_or_path if ref_model is None else ref_model
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ValueError("ref_model and args.ref_model_name_or_path name two references; give one of them")
    if not args.needs_reference:
        if given is not None:
            raise ValueError("a reference was given, but kl_coef and kl_loss_coef are 0: there is no KL to it")
        return None
    if given is None:
        return start()
    if isinstance(given, str):
        given = _named(given, args, quantization_config)
    return frozen(given.to(args.device)), reference_adapter(given)


def _named(name: str, args: TrainerConfig, quantization_config: Any) -> nn.Module:
    arguments = loading_arguments(args, quantization_config)
    base = adapter_base(name)
    model = load_causal_lm(base or name, dtype=arguments.pop("dtype", "auto"), **arguments)
    return model if base is None else PeftModel.from_pretrained(model, name)


def frozen(model: nn.Module) -> nn.Module:
    """In evaluation mode, nothing trainable."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def build_rewards(
    given: Any, args: PPOConfig, tokenizer: PreTrainedTokenizerBase, tokenizers: Any
) -> tuple[Rewards, list[RewardModel]]:
    """The rewards by name and weight, and the reward models among them.

    given: a model (in memory or by name), a function, a list of those, or None for the config's. tokenizers: of the
    models in memory, in order.
    """
    if given is None:
        given = [*(args.reward_model_path or []), *map(load_function, args.reward_funcs or [])]
    elif args.reward_model_path or args.reward_funcs:
        raise ValueError(
            "reward_model and the config's reward_model_path or reward_funcs are two ways; give one of them"
        )
    items = list(given) if isinstance(given, list | tuple) else [given]
    own = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(items)
    sources: dict[str, Any] = {}
    models = []
    tokens = by_device(args.rollout_batch_tokens, DEFAULT_ROLLOUT_BATCH_TOKENS, args)
    for index, item in enumerate(items):
        if isinstance(item, str):
            name = Path(item).name
            model = load_scalar_model(item, dtype="auto", **loading_arguments(args))
            of_model = AutoTokenizer.from_pretrained(item, trust_remote_code=args.trust_remote_code)
        elif isinstance(item, nn.Module):
            name, model = f"model_{index}", item
            of_model = own[index] if index < len(own) and own[index] is not None else tokenizer
        elif callable(item):
            sources[_free(getattr(item, "__name__", f"function_{index}"), sources)] = FunctionReward(item, tokenizer)
            continue
        else:
            raise ValueError(f"reward_model must be a model, its name or a function, got {type(item).__name__}")
        reward = RewardModel(
            frozen(model.to(args.device)), of_model, tokenizer, batch_tokens=tokens, autocast=autocast_dtype(args)
        )
        models.append(reward)
        sources[_free(name, sources)] = reward
    return Rewards(sources, args.reward_weights), models


def _free(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else next(n for i in range(2, 99) if (n := f"{name}_{i}") not in taken)


def build_actor_critic(
    policy: nn.Module, policy_source: str | nn.Module, value_model: str | nn.Module | None, args: PPOConfig,
    reward_models: list[RewardModel], tokenizer: PreTrainedTokenizerBase,
) -> ActorCritic:  # fmt: skip
    """Policy and critic; that starts from value_model, else the first reward model of these tokens, else the policy."""
    given = args.value_model_path if value_model is None else value_model
    if args.advantage_estimator != "gae":
        if given is not None:
            raise ValueError(f"value_model has no effect with advantage_estimator={args.advantage_estimator!r}")
        return ActorCritic(policy)
    if args.value_head:
        if given is not None:
            raise ValueError("value_head=True has no critic of its own, and value_model is one; give one of them")
        return ActorCritic(policy, value_head=True)
    shared = next((r for r in reward_models if r.shares_tokenizer and not isinstance(r.model, PeftModel)), None)
    critic: nn.Module
    if isinstance(given, str):
        critic = load_scalar_model(given, dtype="float32", **loading_arguments(args))
    elif given is not None:
        critic = given
    elif shared is not None:
        critic = copy.deepcopy(shared.model).float()
    elif isinstance(policy_source, str) and adapter_base(policy_source) is None:
        critic = load_scalar_model(policy_source, dtype="float32", **loading_arguments(args))
    else:
        critic = scalar_model_from(policy)
    for parameter in critic.parameters():
        if parameter.is_floating_point() and not isinstance(critic, PeftModel):
            parameter.requires_grad_(True)
    if args.disable_dropout:
        disable_dropout(critic)
    return ActorCritic(policy, critic.to(args.device))


def build_sampler(
    given: Sampler | None, model: ActorCritic, tokenizer: PreTrainedTokenizerBase, args: PPOConfig
) -> Sampler:
    """The sampler that was given, or one by the config."""
    if given is not None:
        if given.options.temperature != args.temperature:
            raise ValueError(
                f"the sampler's temperature is {given.options.temperature}, the config's {args.temperature}: log-probs "
                "are recomputed at the config's, so the two must be one"
            )
        return given
    options = SamplingOptions(
        max_new_tokens=args.response_length, min_new_tokens=args.min_response_length, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, stop_token_ids=stop_ids(tokenizer, args),
    )  # fmt: skip
    if args.use_vllm:
        from fastalign.rollouts.vllm_sampler import VLLMSampler

        return VLLMSampler.for_policy(model.policy, tokenizer, options)
    tokens = by_device(args.rollout_batch_tokens, DEFAULT_ROLLOUT_BATCH_TOKENS, args)
    return TransformersSampler(model.policy, tokenizer, options, batch_tokens=tokens, autocast=autocast_dtype(args))


def stop_ids(tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> tuple[int, ...]:
    """The further stop token that the config names, if any. Raises ValueError for text that is not one token."""
    if args.stop_token_id is not None:
        return (args.stop_token_id,)
    if args.stop_token in (None, "eos"):  # the tokenizer's eos always stops
        return ()
    ids = tokenizer(args.stop_token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"stop_token={args.stop_token!r} is {len(ids)} tokens, one is accepted: give stop_token_id")
    return (ids[0],)


def policy_source(model: str | nn.Module | None, args: PPOConfig) -> str | nn.Module:
    source = args.model_name_or_path if model is None else model
    if source is None:
        raise ValueError("no model: give model, or args.model_name_or_path")
    if not isinstance(source, str | nn.Module):
        raise ValueError(f"model must be a name or a model, got {type(source).__name__}")
    return source
