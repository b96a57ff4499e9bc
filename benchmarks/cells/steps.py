"""Whole steps of DPO and PPO: forward, backward, clipping and AdamW, on real architectures with random weights.

    naive                     the padded batch, logits of every token
    naive, completion logits  the padded batch, logits of the scored tokens alone
    trl                       DPOTrainer's or GRPOTrainer's loss on a model of its own, if a second one fits
    fastalign padded          the fused loss on the padded batch
    fastalign                 the fused loss, prompts of a group computed once ("shared" layout)

All but TRL's train one model in turns, with a learning rate of 0 so that each meets the same weights; a provider's loss
is compared with naive's. The reference's log-probs, old log-probs and advantages are given: a step here is what a
trainer repeats. Responses have lengths of their own, half to all of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import heads
import numpy as np
import torch
from inputs import IGNORED, log_probs
from torch import Tensor

from cells import Cell, Row, Tell, protected

BETA, EPSILON = 0.1, 0.2
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": LLAMA | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": LLAMA | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    },
    "tiny": LLAMA | {
        "vocab_size": 211, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "max_position_embeddings": 256,
    },
}  # fmt: skip
PARAMETERS = {"qwen3-0.6b": 0.6e9, "llama-3.2-1b": 1.24e9, "llama-3.1-8b": 8.03e9, "tiny": 3e4}
CHECKPOINTED = ("llama-3.1-8b",)  # activations are computed again in the backward
# (groups, members, prompt, longest response)
BATCHES = {"dpo": {"": (8, 2, 512, 512), "llama-3.1-8b": (4, 2, 512, 512)}, "ppo": {"": (4, 4, 512, 512)}}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the loss, relative to the size of its terms


def cells(device: str, small: bool) -> list[Cell]:
    found = []
    for number, model in enumerate(("tiny",) if small else ("llama-3.2-1b", "qwen3-0.6b", "llama-3.1-8b")):
        for task in ("dpo", "ppo"):
            sizes = BATCHES[task].get(model, BATCHES[task][""]) if model != "tiny" else (3, 2, 9, 12)
            tokens, parameters = sizes[0] * sizes[1] * (sizes[2] + sizes[3]), PARAMETERS[model]
            step = 8 * parameters * tokens / (3e14 if device == "cuda" else 2e10)
            gib = (8 if device == "cuda" else 16) * parameters / 2**30 + tokens * MODELS[model][
                "vocab_size"
            ] * 14 / 2**30
            settings = {
                "task": task, "model": model, "sizes": sizes, "device": device,
                "dtype": "float32" if device == "cpu" else "bfloat16",
            }  # fmt: skip
            name = f"steps/{task}/{model}/" + "x".join(map(str, sizes))
            found.append(Cell("cells.steps", name, 2 if number == 0 else 3, 25 + 5 * 8 * step, gib, settings))
    return found


def run(cell: Cell, tell: Tell, skip: dict[str, str]) -> list[Row]:
    s = cell.settings
    device, dtype = s["device"], getattr(torch, s["dtype"])
    tell("inputs")
    torch.manual_seed(0)
    model = make_model(s["model"], device, dtype)
    batch = make_batch(s["task"], s["sizes"], model.config.vocab_size, device)
    sample(model, batch)
    providers = _providers(s["task"], model, batch, s, device, dtype)
    optimizer = make_optimizer(model)
    calls: dict[Any, Callable[[], Any]] = {}
    rows: list[Row] = []
    expected = None
    for name, make in providers.items():
        row: Row = {"provider": name, "error": skip.get(name, "")}
        rows.append(row)
        if not row["error"] and (package := heads.missing(name)):
            row["error"] = f"not installed: {package}"
        if row["error"]:
            continue
        tell(name)

        def first(name: str = name, make: Any = make, row: Row = row) -> None:
            loss, own_model, own_optimizer = make()
            step = partial(_step, loss, own_model or model, own_optimizer or optimizer)
            row["loss"] = float(step())  # warms up
            row["peak_mib"] = harness.peak_bytes(step, device) / 2**20
            calls[name] = step

        row["error"] = protected(first) or ""
        expected = row.get("loss") if expected is None and name.startswith("naive") else expected
        if (
            expected is not None
            and "loss" in row
            and abs(row["loss"] - expected) > ALLOWED[dtype] * max(1, abs(expected))
        ):
            row["error"] = f"a loss of {row['loss']:.6g}, plain PyTorch's is {expected:.6g}"
            calls.pop(name, None)
    tell("timing")
    times = harness.interleaved(calls, rounds=7 if device == "cuda" else 2, device=device, seconds=6.0)
    middle = {name: harness.median(found) for name, found in times.items()}
    about = {
        "task": s["task"], "model": s["model"], "dtype": s["dtype"], "sizes": "x".join(map(str, s["sizes"])),
        "tokens": int(batch["lengths"].sum()), "checkpointed": s["model"] in CHECKPOINTED,
    }  # fmt: skip
    for row in rows:
        name = row["provider"]
        if name in middle:
            row |= {
                "seconds": middle[name],
                "fastest": min(times[name]),
                "tokens_per_second": about["tokens"] / middle[name],
            }
            row["over_naive"] = middle[name] / middle["naive"] if "naive" in middle else None
    return [about | row for row in rows]


def _step(loss: Callable[[], Tensor], model: Any, optimizer: Any) -> Tensor:
    value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def make_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """A causal LM of this shape; nothing is looked up anywhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(MODELS[name])
    config = AutoConfig.for_model(given.pop("model_type"), **given, use_cache=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if name in CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(task: str, sizes: tuple[int, int, int, int], vocabulary: int, device: str) -> dict[str, Any]:
    """As the collators leave it: member m of group g is sequence m·groups + g."""
    groups, members, prompt, longest = sizes
    draw = np.random.default_rng(0)
    responses = draw.integers(longest // 2, longest + 1, groups * members)
    prompts = np.tile(draw.integers(1, vocabulary, (groups, prompt)), (members, 1))
    positions = np.arange(prompt + longest)
    ids = np.concatenate([prompts, draw.integers(1, vocabulary, (groups * members, longest))], axis=1)
    lengths = prompt + responses
    real = positions < lengths[:, None]
    counts = (positions >= prompt - 1) & (positions < lengths[:, None] - 1)
    targets = np.where(counts, np.roll(ids, -1, axis=1), IGNORED)
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.where(real, ids, 0)).to(device),
        "attention_mask": torch.from_numpy(real.astype(np.int64)).to(device),
        "targets": torch.from_numpy(targets).to(device),
        "rows": np.flatnonzero(counts), "cu_seqlens": np.concatenate([[0], np.cumsum(responses)]).astype(np.int32),
        "groups": np.tile(np.arange(groups), members), "lengths": lengths, "prompt": prompt,
        "prefix_lengths": np.full(groups, prompt),
    }  # fmt: skip
    each = torch.tensor([1.0, -0.7])[torch.arange(len(lengths)) % 2]
    batch["advantages"] = each.repeat_interleave(torch.from_numpy(responses)).to(device)
    return batch


def sample(model: Any, batch: dict[str, Any]) -> None:
    """The reference and the sampling policy are near the model."""
    ids = batch["input_ids"]
    rows = torch.from_numpy(batch["rows"]).to(ids.device)
    g = torch.Generator(ids.device).manual_seed(0)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False)[0]
        parts = hidden.flatten(0, 1)[rows].split(512), batch["targets"].flatten()[rows].split(512)
        logps = torch.cat([log_probs(h, model.lm_head.weight, t) for h, t in zip(*parts, strict=True)])
    batch["old_logps"] = logps + 0.03 * torch.randn(logps.shape, device=ids.device, generator=g)
    sums = torch.stack([part.sum() for part in logps.split(np.diff(batch["cu_seqlens"]).tolist())])
    batch["ref_logps"] = sums + torch.randn(sums.shape, device=ids.device, generator=g)


def _providers(
    task: str, model: Any, batch: dict[str, Any], s: dict[str, Any], device: str, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[Callable[[], Tensor], Any, Any]]]:
    """name -> a function that prepares (loss(), model, optimizer); None for the shared ones."""
    from cells import steps_trl

    loss = {"dpo": dpo_of, "ppo": ppo_of}[task]

    def plain(every_token: bool) -> tuple[Callable[[], Tensor], None, None]:
        return lambda: loss(naive_logps(model, batch, every_token), batch), None, None

    def ours(layout: str) -> tuple[Callable[[], Tensor], None, None]:
        return fused(task, model, batch, layout), None, None

    return {
        "naive": partial(plain, True), "naive, completion logits": partial(plain, False),
        "trl": partial(steps_trl.prepare, task, s["model"], batch, device, dtype, PARAMETERS[s["model"]]),
        "fastalign padded": partial(ours, "padded"), "fastalign": partial(ours, "shared"),
    }  # fmt: skip


def naive_logps(model: Any, batch: dict[str, Any], every_token: bool) -> Tensor:
    """(n,) log-probs of the scored tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = torch.from_numpy(batch["rows"]).to(ids.device, non_blocking=True)
    targets = batch["targets"].flatten()
    if not every_token:
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return log_probs(hidden.flatten(0, 1)[rows], model.lm_head.weight, targets[rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1).float()
    return logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0][rows]


def dpo_of(logps: Tensor, batch: dict[str, Any]) -> Tensor:
    sums = torch.stack([part.sum() for part in logps.split(np.diff(batch["cu_seqlens"]).tolist())])
    chosen, rejected = (sums - batch["ref_logps"]).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def ppo_of(logps: Tensor, batch: dict[str, Any]) -> Tensor:
    ratio, advantages = torch.exp(logps - batch["old_logps"]), batch["advantages"]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages).mean()


def fused(task: str, model: Any, batch: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    from fastalign import linear_dpo_loss, linear_ppo_loss
    from fastalign.models import enable_segments, fuse_head, plan_layout, run_layout

    fuse_head(model)
    if mode != "padded":
        enable_segments(model)
    n = len(batch["rows"])
    device = batch["input_ids"].device

    def head_fn(hidden: Tensor, head: Any) -> Tensor:
        rows = torch.from_numpy(batch["rows"]).to(device, non_blocking=True)
        given: dict[str, Any] = {
            "targets": batch["targets"].flatten().index_select(0, rows), "rows": torch.arange(n),
            "cu_seqlens": torch.from_numpy(batch["cu_seqlens"]), **head.options,
        }  # fmt: skip
        if task == "dpo":
            return linear_dpo_loss(hidden, head.weight, ref_logps=batch["ref_logps"], beta=BETA, **given).loss
        sampled = {name: batch[name] for name in ("old_logps", "advantages")}
        bounds = {"epsilon_low": EPSILON, "epsilon_high": EPSILON}
        return linear_ppo_loss(hidden, head.weight, **sampled, **bounds, **given).loss

    return lambda: run_layout(model, batch, plan_layout(batch, mode), head_fn, use_cache=False)
