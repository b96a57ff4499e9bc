"""The training examples of a run by its config, read or made up, for plans and measurements of its steps."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from fastalign.trainers.config import TrainerConfig
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.dpo_setup import examples_of
from fastalign.trainers.examples import Examples
from fastalign.trainers.loading import load_tokenizer
from fastalign.trainers.ppo_config import PPOConfig
from fastalign.trainers.ppo_models import prompt_sets
from fastalign.trainers.pro_config import PROConfig
from fastalign.trainers.pro_examples import ListExamples
from fastalign.trainers.reward_config import RewardConfig
from fastalign.trainers.reward_examples import RewardExamples
from fastalign.trainers.sft_config import SFTConfig
from fastalign.trainers.sft_data import completion_examples, packed, prepare_tokenizer

RESPONSES = 4  # of a list, where no data say how many


def examples_for(args: TrainerConfig, tokenizer: Any) -> Examples:
    """The trainer's way from rows to tokens and batches."""
    if isinstance(args, DPOConfig):
        return examples_of(tokenizer, args)
    if isinstance(args, PROConfig):
        return ListExamples(tokenizer, args)
    if isinstance(args, RewardConfig):
        return RewardExamples(tokenizer, args)
    if isinstance(args, PPOConfig):
        return prompt_sets(tokenizer, args).examples
    if isinstance(args, SFTConfig):
        prepare_tokenizer(tokenizer, args)
        return completion_examples(tokenizer, args)
    raise ValueError(f"{type(args).__name__} is not the config of a trainer that plans are made for")


def read_examples(args: TrainerConfig, model: str) -> tuple[Dataset, Examples]:
    """The tokenised training set of a run. ValueError where the config names none."""
    examples = examples_for(args, load_tokenizer(None, model, args))
    data = examples.training(None)
    if data is None:
        raise ValueError("dataset_name is missing: give it, or the tokens of a sequence")
    if isinstance(args, SFTConfig) and args.packing:
        data = packed(data, "train", args)
    return data, examples


class _AnyTokenizer:
    """Stands for the tokenizer where nothing is tokenised."""

    pad_token_id = eos_token_id = 0


def made_examples(args: TrainerConfig, tokens: int, count: int | None = None) -> tuple[Dataset, Examples]:
    """Examples of sequences of `tokens` tokens, half of them the prompt's; all of them SFT's but the first. Of PPO's,
    prompts that leave room for response_length tokens. count: by default as many as a device batch may hold.
    """
    if tokens < 4:
        raise ValueError(f"tokens={tokens}: a sequence has at least 4")
    if count is None:
        limit = args.max_tokens_per_batch
        count = args.per_device_train_batch_size if limit is None else max(limit // tokens, 1)
    prompt = [0] * (tokens // 2)
    # responses to a prompt that differ from the first token on: nothing but the prompt is shared
    responses = [[i + 1] * (tokens - tokens // 2) for i in range(RESPONSES)]
    row: dict[str, Any] = {"prompt_ids": prompt, "row": 0}
    if isinstance(args, SFTConfig):
        row = {"input_ids": prompt + responses[0], "completion_mask": [False] + [True] * (tokens - 1), "row": 0}
    elif isinstance(args, PPOConfig):
        if tokens <= args.response_length:
            raise ValueError(f"tokens={tokens}: no room for a prompt beside response_length={args.response_length}")
        row["prompt_ids"] = [0] * (tokens - args.response_length)
    elif isinstance(args, PROConfig):
        row |= {"response_ids": responses, "ranks": [float(i + 1) for i in range(RESPONSES)]}
    elif isinstance(args, DPOConfig) and not args.on_pairs:
        row |= {"completion_ids": responses[0], "label": True}
        if args.needs_kl:
            row["kl_completion_ids"] = responses[1]
    else:
        row |= {"chosen_ids": responses[0], "rejected_ids": responses[1]}
    tokenizer = _AnyTokenizer()
    if isinstance(args, SFTConfig):
        return Dataset.from_list([row] * count), completion_examples(tokenizer, args)
    return Dataset.from_list([row] * count), examples_for(args, tokenizer)
