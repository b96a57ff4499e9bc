"""What the examples train on: questions about a shop, answered rightly and wrongly. Nothing is downloaded.

A model of a hundred thousand parameters, its tokenizer, and preference pairs of the language of `fastalign demo`.
"""

from __future__ import annotations

import random
from typing import Any

from fastalign.data import PreferenceCollator
from fastalign.demo.language import Writers, ask
from fastalign.demo.model import build_model, build_tokenizer

RIGHT, WRONG = Writers(p_mention=1.0, p_right=1.0, p_filler=0.1), Writers(p_mention=1.0, p_right=0.0, p_filler=0.1)


def text_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of prompt, chosen (right in every detail) and rejected (wrong in every detail)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        question = ask(rng)
        chosen, rejected = RIGHT.write(question, rng), WRONG.write(question, rng)
        rows.append({"prompt": question.prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return rows


def token_pairs(tokenizer: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as token ids: prompt_ids, chosen_ids, rejected_ids, which `PreferenceCollator` takes."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [
        {"row": row, "prompt_ids": ids(pair["prompt"])}
        | {f"{side}_ids": [*ids(pair[side]), tokenizer.eos_token_id] for side in ("chosen", "rejected")}
        for row, pair in enumerate(text_pairs(count, seed))
    ]


def batches(tokenizer: Any, count: int, pairs_per_batch: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Padded batches: input_ids, attention_mask, targets (2P, T), chosen half first; rows, cu_seqlens on the host."""
    collate = PreferenceCollator(tokenizer.pad_token_id)
    pairs = token_pairs(tokenizer, count * pairs_per_batch, seed)
    return [collate(pairs[i : i + pairs_per_batch]) for i in range(0, len(pairs), pairs_per_batch)]


__all__ = ["batches", "build_model", "build_tokenizer", "text_pairs", "token_pairs"]
