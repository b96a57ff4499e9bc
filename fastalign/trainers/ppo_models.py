"""The models and data of a PPO run from what was handed in: policy, reference, critic, rewards, sampler, prompts."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastalign.data import CompletionCollator, DataReport, prepare_prompts
from fastalign.models import check_source, disable_dropout, load_causal_lm, load_scalar_model, upcast_trainable
from fastalign.models.actor_critic import ActorCritic, scalar_model_from, whole_model
from fastalign.models.head import base_causal_lm
from fastalign.models.rewards import set_reward_normalization
from fastalign.models.scalar import load_scalar_adapter
from fastalign.rollouts import Sampler, SamplingOptions, TransformersSampler
from fastalign.trainers.config import TrainerConfig, by_device
from fastalign.trainers.examples import Examples, padding_id
from fastalign.trainers.fisher import check_double_backward
from fastalign.trainers.loading import (
    adapter_base,
    add_adapter,
    autocast_dtype,
    check_trainable,
    is_movable,
    load_model,
    loading_arguments,
    lora_config,
    prepare_checkpointing,
)
from fastalign.trainers.ppo_config import DEFAULT_ROLLOUT_BATCH_TOKENS, PPOConfig
from fastalign.trainers.ppo_rollout import PromptSet, ReadColumns
from fastalign.trainers.reference import list_lengths, reference_adapter
from fastalign.trainers.reward_functions import FunctionReward, RewardModel, Rewards, load_function

logger = logging.getLogger(__name__)

_VLLM_MEMORY = 0.3  # of the GPU's; the rest is for training


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompt data sets for a trainer."""

    examples: Examples
    _columns: WeakKeyDictionary[Dataset, ReadColumns]

    def wrap(self, dataset: Dataset) -> PromptSet:
        return PromptSet(dataset, self._columns.get(dataset))

    def training(self, dataset: Any) -> PromptSet | None:
        found = self.examples.training(dataset)
        return None if found is None else self.wrap(found)

    def evaluation(self, dataset: Any) -> dict[str, PromptSet]:
        return {name: self.wrap(part) for name, part in self.examples.evaluation(dataset).items()}


def prompt_sets(tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Prompts:
    """Prompts by a config's settings: prompt_ids, and the row's other columns on demand."""
    columns: WeakKeyDictionary[Dataset, ReadColumns] = WeakKeyDictionary()

    def tokenize(dataset: Any, tokenizer: Any, **options: Any) -> tuple[Dataset, DataReport]:
        data = prepare_prompts(
            dataset, tokenizer, format=args.dataset_format, max_length=args.max_length,
            on_long_prompt=args.on_long_prompt, on_bad_row=args.on_bad_row, **options,
        )  # fmt: skip
        columns[data.dataset] = data.columns
        return data.dataset, data.report

    collator = CompletionCollator(padding_id(tokenizer), pad_to_multiple_of=args.pad_to_multiple_of)
    lengths = partial(list_lengths, name="prompt_ids")
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
    ref_model: str | nn.Module | None, args: PPOConfig, policy: str | nn.Module,
    start: Callable[[], tuple[nn.Module, str | None]], quantization_config: Any,
) -> tuple[nn.Module, str | None] | None:  # fmt: skip
    """The model that the KL is to and the adapter that is on in it; None where the config asks for no KL.

    policy: what was handed in as the policy. start: see `build_policy`.
    """
    given = args.ref_model_name_or_path if ref_model is None else ref_model
    if isinstance(ref_model, nn.Module) and ref_model is policy:
        raise ValueError("ref_model is the model that trains; leave ref_model out for the policy as it is now")
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
    return frozen(_placed(given, args)), reference_adapter(given)


def _named(name: str, args: TrainerConfig, quantization_config: Any) -> nn.Module:
    arguments = loading_arguments(args, quantization_config)
    base = adapter_base(name)
    model = load_causal_lm(base or name, dtype=arguments.pop("dtype", "auto"), **arguments)
    return model if base is None else PeftModel.from_pretrained(model, name)


def _placed(model: nn.Module, args: TrainerConfig) -> nn.Module:
    """On the trainer's device, where a model can be moved."""
    return model.to(args.device) if is_movable(model) else model


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
    models in memory; one for all, or a list as long as the rewards, None where the policy's is meant.
    """
    if given is None:
        given = [*(args.reward_model_path or []), *map(load_function, args.reward_funcs or [])]
    elif args.reward_model_path or args.reward_funcs:
        raise ValueError(
            "reward_model and the config's reward_model_path or reward_funcs are two ways; give one of them"
        )
    items = list(given) if isinstance(given, list | tuple) else [given]
    own = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(items)
    if len(own) != len(items):
        raise ValueError(f"reward_processing_class has {len(own)} tokenizers for {len(items)} rewards")
    sources: dict[str, Any] = {}
    models = []
    tokens = by_device(args.rollout_batch_tokens, DEFAULT_ROLLOUT_BATCH_TOKENS, args)
    for index, (item, of_item) in enumerate(zip(items, own, strict=True)):
        if isinstance(item, str):
            name, model = Path(item).name, _named_scalar(item, args, dtype="auto")
            of_model = AutoTokenizer.from_pretrained(item, trust_remote_code=args.trust_remote_code)
        elif isinstance(item, nn.Module):
            name, model, of_model = f"model_{index}", item, tokenizer if of_item is None else of_item
        elif callable(item):
            sources[_free(getattr(item, "__name__", f"function_{index}"), sources)] = FunctionReward(item, tokenizer)
            continue
        else:
            raise ValueError(f"reward_model must be a model, its name or a function, got {type(item).__name__}")
        reward = RewardModel(
            frozen(_placed(model, args)), of_model, tokenizer, batch_tokens=tokens, autocast=autocast_dtype(args)
        )
        models.append(reward)
        sources[_free(name, sources)] = reward
    return Rewards(sources, args.reward_weights), models


def _named_scalar(name: str, args: PPOConfig, *, dtype: str) -> nn.Module:
    """A scalar model by name; a folder with an adapter stands for its base model with the adapter."""
    load = load_scalar_model if adapter_base(name) is None else load_scalar_adapter
    return load(name, dtype=dtype, **loading_arguments(args))


def _free(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else next(n for i in range(2, 99) if (n := f"{name}_{i}") not in taken)


def build_actor_critic(
    policy: nn.Module, policy_source: str | nn.Module, value_model: str | nn.Module | None, args: PPOConfig,
    reward_models: list[RewardModel],
) -> ActorCritic:  # fmt: skip
    """Policy and critic; that starts from value_model, else the first reward model of these tokens, else the policy."""
    given = args.value_model_path if value_model is None else value_model
    if value_model is not None and args.value_model_path is not None:
        raise ValueError("value_model and args.value_model_path name two critics; give one of them")
    if args.advantage_estimator != "gae":
        if given is not None:
            raise ValueError(f"value_model has no effect with advantage_estimator={args.advantage_estimator!r}")
        return ActorCritic(policy)
    if args.value_head:
        if given is not None:
            raise ValueError("value_head=True has no critic of its own, and value_model is one; give one of them")
        return ActorCritic(policy, value_head=True)
    shared = next((reward.model for reward in reward_models if reward.shares_tokenizer), None)
    critic: nn.Module
    if isinstance(given, str):
        critic = whole_model(_named_scalar(given, args, dtype="float32"))
    elif given is not None:
        if any(given is reward.model for reward in reward_models):
            raise ValueError("value_model is the reward model, which stays as it is; leave it out to train a copy")
        critic = given
    elif shared is not None:
        critic = whole_model(copy.deepcopy(shared))
    elif isinstance(policy_source, str) and adapter_base(policy_source) is None:
        critic = _named_scalar(policy_source, args, dtype="float32")
    else:
        critic = scalar_model_from(policy)
    if not any(parameter.requires_grad for parameter in critic.parameters()):
        critic.requires_grad_(True)  # a reward model, which was frozen to score
    upcast_trainable(critic)
    set_reward_normalization(critic, None)  # of a reward model's scores: values are of shaped rewards
    if args.disable_dropout:
        disable_dropout(critic)
    return ActorCritic(policy, critic.to(args.device))


def build_sampler(
    given: Sampler | None, model: ActorCritic, tokenizer: PreTrainedTokenizerBase, args: PPOConfig
) -> Sampler:
    """The sampler that was given, if it samples as the config says, or one by the config."""
    options = SamplingOptions(
        max_new_tokens=args.response_length, min_new_tokens=args.min_response_length, temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, stop_token_ids=stop_ids(tokenizer, args),
    )  # fmt: skip
    if not options.is_pure:
        logger.warning(
            "top_k=%s, top_p=%s, min_response_length=%s: what is sampled is not what is trained, whose log-probs are "
            "those of the whole vocabulary; ratios and KL are biased",
            args.top_k, args.top_p, args.min_response_length,
        )  # fmt: skip
    if given is not None:
        if args.use_vllm:
            raise ValueError("use_vllm=True and sampler are two ways to sample; give one of them")
        for field in fields(options):
            own, config = getattr(given.options, field.name), getattr(options, field.name)
            if own != config:
                raise ValueError(f"the sampler's {field.name} is {own!r}, the config's {config!r}: they must be one")
        return given
    if args.use_vllm:
        return _vllm_sampler(model.policy, tokenizer, options)
    tokens = by_device(args.rollout_batch_tokens, DEFAULT_ROLLOUT_BATCH_TOKENS, args)
    return TransformersSampler(model.policy, tokenizer, options, batch_tokens=tokens, autocast=autocast_dtype(args))


def _vllm_sampler(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, options: SamplingOptions) -> Sampler:
    """An engine of its own from the policy's checkpoint, with vLLM's defaults but for its share of the memory."""
    name = base_causal_lm(policy).config._name_or_path
    if not name:
        raise ValueError(
            "use_vllm=True needs a policy that was loaded by name, or give sampler=VLLMSampler(your engine, ...)"
        )
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(f"use_vllm=True needs vllm, which cannot be imported: {error}") from error
    from fastalign.rollouts.vllm_sampler import VLLMSampler

    engine = vllm.LLM(model=name, logprobs_mode="processed_logprobs", gpu_memory_utilization=_VLLM_MEMORY)
    return VLLMSampler(engine, tokenizer, options)


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
    if isinstance(source, str):
        check_source(source, "model_name_or_path" if model is None else "model")
    return source
