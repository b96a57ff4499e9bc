"""DPO by hand, for dpo_step.py: padded, or one sequence at a time."""

from __future__ import annotations

import time
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup


class NaiveLoop:
    """What one writes without a library, reasonably: no logits of prompts, no reference in the loop."""

    def __init__(self, model: str, *, batch: int, padded: bool, beta: float, learning_rate: float, clock: Any) -> None:
        self.name, self.batch, self.padded, self.clock = model, batch, padded, clock
        self.beta, self.learning_rate = beta, learning_rate

    def logps(self, prompts: list[list[int]], responses: list[list[int]]) -> Any:
        """(S,) summed log-probs of the responses, in one forward."""
        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask, counted = torch.zeros_like(ids), torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            length = len(prompt) + len(response)
            ids[row, :length], mask[row, :length] = torch.tensor(prompt + response), 1
            counted[row, len(prompt) - 1 : length - 1] = True
        inputs = {"attention_mask": mask} if self.padded else {}
        hidden = self.model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        targets = ids.roll(-1, 1)[counted]
        logps = self.model.lm_head(hidden[counted]).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return torch.stack([part.sum() for part in logps.split(counted.sum(1).tolist())])

    def groups(self, batch: list[Any]) -> list[list[Any]]:
        """What goes through the model before a backward: the batch, or one pair."""
        return [batch] if self.padded else [[example] for example in batch]

    def pair_logps(self, batch: list[dict[str, list[int]]]) -> Any:
        """(2, P): chosen, rejected."""
        prompts = [example["prompt_ids"] for example in batch]
        sides = [[example[f"{side}_ids"] for example in batch] for side in ("chosen", "rejected")]
        if self.padded:
            return self.logps(prompts * 2, sides[0] + sides[1]).view(2, -1)
        return torch.stack([self.logps(prompts, side) for side in sides])

    def run(self, examples: list[dict[str, list[int]]]) -> tuple[float, int]:
        """(seconds that the reference took, high-water mark before the first step)."""
        self.model = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32)
        batches = [examples[i : i + self.batch] for i in range(0, len(examples), self.batch)]
        start = time.perf_counter()
        with torch.no_grad():
            reference = [[self.pair_logps(group) for group in self.groups(batch)] for batch in batches]
        seconds, before = time.perf_counter() - start, harness.high_water()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, len(batches))
        for batch, cached in zip(batches, reference, strict=True):
            self.clock.begin()
            total = 0.0
            for group, ref in zip(self.groups(batch), cached, strict=True):
                chosen, rejected = self.pair_logps(group) - ref
                loss = -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected)).sum() / len(batch)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.clock.end()
            self.clock.losses.append(total)
        return seconds, before
