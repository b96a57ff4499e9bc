"""The examination of a run before it starts: its weights, its data, its model in every layout, its head, its cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from fastalign.doctor.findings import FAILED, OK, SKIPPED, Finding, compare, guarded
from fastalign.doctor.head import HeadProblem, examine_head
from fastalign.models import TOKEN_LAYOUTS, Head, disable_dropout, enable_segments, fuse_head, plan_layout, run_layout
from fastalign.models.inference import evaluating
from fastalign.reference import verify
from fastalign.trainers.batches import Batch
from fastalign.trainers.dpo_config import DPOConfig
from fastalign.trainers.dpo_reference import DEFAULT_CACHE_DIR
from fastalign.trainers.examples import Examples
from fastalign.trainers.layouts import row_targets
from fastalign.trainers.loading import autocast_dtype, load_model, load_tokenizer
from fastalign.trainers.log_probs import batch_logps
from fastalign.trainers.reference import logps_tolerance
from fastalign.trainers.run_data import examples_for


def examine(args: DPOConfig, *, pairs: int = 4) -> Iterator[Finding]:
    """Findings, as they come, of `fastalign dpo` with these settings; nothing is trained and nothing written.

    pairs: how many of the data's valid pairs the model is run on. Without dataset_name they are made of random tokens.

    Raises ValueError where there is nothing to examine: no model, no readable data, a loss on single responses.
    """
    if not args.on_pairs:
        raise ValueError(f"loss_type={args.loss_type!r} learns from single responses; the examination is of pairs")
    name = args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing: the model to examine")
    tokenizer = load_tokenizer(None, name, args)
    examples = examples_for(args, tokenizer)
    yield from _tokenizer(tokenizer)
    model = load_model(name, args, None, None)
    disable_dropout(model)
    data = _data(args, examples, pairs, model)
    yield from _reports(examples, data)
    sound = [*_finite(model), *guarded("head", lambda: _fused(model))]
    yield from sound
    if any(finding.status == FAILED for finding in sound):
        yield Finding("layouts, backends, schedules, losses", SKIPPED, "the model cannot be run")
    else:
        yield from _run(model, examples, data, args)
    yield from guarded("reference cache", lambda: _cache(args))


def _run(model: nn.Module, examples: Examples, data: Dataset, args: DPOConfig) -> Iterator[Finding]:
    batch = examples.collator([data[i] for i in range(len(data))])
    moved = {key: value.to(args.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with evaluating(model), torch.autocast(args.device.type, autocast_dtype(args), enabled=bool(autocast_dtype(args))):
        yield from guarded("layouts", lambda: _layouts(model, moved, args))
        problem = head_problem(model, moved)
    yield from examine_head(problem)


def head_problem(model: nn.Module, batch: Batch) -> HeadProblem:
    """The head of a fused model, with the hidden states of a batch of pairs."""
    found: dict[str, Any] = {}

    def head_fn(hidden: Tensor, head: Head) -> Tensor:
        found["hidden"], found["head"] = hidden.detach(), head
        return hidden.new_zeros(())

    with torch.no_grad():
        run_layout(model, batch, None, head_fn)
    hidden, head = found["hidden"], found["head"]
    return HeadProblem(
        hidden,
        head.weight.detach(),
        row_targets(batch, hidden.device),
        torch.from_numpy(np.asarray(batch["cu_seqlens"])),
        None if head.bias is None else head.bias.detach(),
        head.logit_scale,
        head.softcap,
    )


def _data(args: DPOConfig, examples: Examples, pairs: int, model: nn.Module) -> Dataset:
    """The first pairs of the run's data, or made ones."""
    data = examples.training(None)
    if data is not None:
        return data.select(range(min(pairs, len(data))))
    generator = np.random.default_rng(0)
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    def tokens(count: int) -> list[int]:
        return generator.integers(0, vocab, count).tolist()

    lengths = [(8 + 3 * i, 5 + i, 9 + 2 * i) for i in range(pairs)]
    return Dataset.from_list(
        [
            {"prompt_ids": tokens(p), "chosen_ids": tokens(c), "rejected_ids": tokens(r), "row": i}
            for i, (p, c, r) in enumerate(lengths)
        ]
    )


def _tokenizer(tokenizer: Any) -> Iterator[Finding]:
    for token in ("eos_token", "pad_token"):
        value = getattr(tokenizer, token, None)
        yield Finding(f"tokenizer: {token}", OK if value is not None else FAILED, repr(value))
    template = bool(getattr(tokenizer, "chat_template", None))
    yield Finding(
        "tokenizer: chat template", OK if template else SKIPPED, "there is one" if template else "none: texts only"
    )


def _reports(examples: Examples, data: Dataset) -> Iterator[Finding]:
    if not examples.reports:
        yield Finding("data", SKIPPED, f"no dataset_name: {len(data)} pairs of random tokens")
    for name, report in examples.reports.items():
        yield Finding(f"data: {name}", FAILED if report.bad else OK, str(report))


def _finite(model: nn.Module) -> Iterator[Finding]:
    """No parameter holds a nan or an infinity."""
    wrong = [name for name, value in model.named_parameters() if not bool(value.detach().isfinite().all())]
    count = sum(value.numel() for value in model.parameters())
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        yield Finding("weights are finite", FAILED, f"nan or infinity in {', '.join(wrong[:3])}{more}")
    else:
        yield Finding("weights are finite", OK, f"{count} parameters")


def _fused(model: nn.Module) -> Iterator[Finding]:
    fuse_head(model)  # compares hidden states through the head with the model's own logits
    yield Finding("head", OK, f"{type(model).__name__}: hidden states through it are the model's own logits")


def _layouts(model: nn.Module, batch: Batch, args: DPOConfig) -> Iterator[Finding]:
    """The same log-probs whatever way the tokens go through the model."""
    dtype = autocast_dtype(args) or next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad():
        padded = batch_logps(model, batch, args, "padded")
        try:
            enable_segments(model)
        except ValueError as error:
            yield Finding("layouts packed, shared", SKIPPED, str(error))
            return
        for layout in TOKEN_LAYOUTS[1:]:
            difference = float((batch_logps(model, batch, args, layout) - padded).abs().mean())
            plan = plan_layout(batch, layout)
            assert plan is not None
            what = f"nats a token from padded, {plan.computed} tokens instead of {plan.padded}"
            yield compare(f"layout {layout}", difference, logps_tolerance(dtype), what)


def _cache(args: DPOConfig) -> Iterator[Finding]:
    folder = Path(args.cache_dir or DEFAULT_CACHE_DIR).expanduser()
    if not folder.exists():
        yield Finding("reference cache", SKIPPED, f"{folder} is not there yet")
        return
    problems = verify(folder)
    detail = "; ".join(str(problem) for problem in problems) or f"{folder}: every byte agrees with its checksum"
    yield Finding("reference cache", FAILED if problems else OK, detail)
