"""Supervised fine-tuning on the clerks' answers: a plain loop around `linear_cross_entropy`."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from fastalign.demo.progress import Step
from fastalign.linear import linear_cross_entropy
from fastalign.models import Head, fuse_head, unfuse_head
from fastalign.reference import TokenSequence
from fastalign.types import IGNORE_INDEX


def train_sft(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Step,
) -> None:
    """One pass over `sequences` in random order, in place; the loss is the mean over answer tokens.

    AdamW without weight decay, a tenth of the steps to warm up, then cosine decay.
    """
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    fuse_head(model).train()
    for batch in batches:
        input_ids, attention_mask, targets = _pad([sequences[i] for i in batch])
        rows = (targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]

        def loss_of(hidden: Tensor, head: Head, targets: Tensor = targets, rows: Tensor = rows) -> Tensor:
            return linear_cross_entropy(hidden, head.weight, targets, rows=rows, **head.options).loss

        loss = model(input_ids=input_ids, attention_mask=attention_mask, head_fn=loss_of)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        on_step(f"loss {loss.item():.3f}")
    unfuse_head(model).eval()


def _pad(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and targets, (B, T) int64, right padded; targets aligned with the hidden states."""
    width = max(len(ids) for ids, _ in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    for row, (ids, start) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
        attention_mask[row, : len(ids)] = 1
        targets[row, start - 1 : len(ids) - 1] = torch.as_tensor(ids[start:])
    return input_ids, attention_mask, targets
