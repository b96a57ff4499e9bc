"""The plan of a step: peak memory by part, and floating-point operations, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastalign.planning.heap import mean_peak
from fastalign.planning.phases import SAMPLING, SCORING, UPDATE
from fastalign.planning.recorder import COPIES, KERNEL_BYTES, KERNELS, LIBRARIES, WEIGHTS, peak_by_name
from fastalign.planning.step import StepRecord

PARTS = {
    WEIGHTS: "parameters and buffers of the model",
    "adapter": "parameters that train beside a frozen base",
    COPIES: "weights in the precision that autocast computes in",
    "gradients": "of the parameters that train",
    "optimizer": "its state, and what a step of it takes",
    "activations": "what the layers compute and the backward needs, and its gradients",
    "head": "workspace of the linear head, its gradients and accumulators",
    "batch": "token ids and what goes with them",
    "reference": "a reference model that stays in memory",
    "critic": "parameters and buffers of a critic",
    "rewards": "reward models",
    "cache": "keys and values of completions while they are sampled",
    "processes": "buckets in which gradients are exchanged between processes",
    LIBRARIES: "kernels that oneDNN compiles for products in 16 bits",
    "allocator": "memory that malloc holds and cannot reuse",
    "objects": "of the interpreter and of autograd",
}
_OF_PHASE = dict.fromkeys(("", "forward", "backward", SAMPLING, SCORING, UPDATE), "activations")
# Of a process on the CPU, measured: kernels of the probes that prove a model's head and layouts, in 16 bits; objects of
# a trainer, its data and a graph, and pages of code.
_PROBE_BYTES, _OBJECT_BYTES = 17 * 2**20, 8 * 2**20
_STEPS = 3  # the heap's holes have grown to what they will be


@dataclass(frozen=True)
class StepPlan:
    """What a step takes. Bytes are those beyond a process that has imported its libraries and done nothing yet.

    parts           bytes alive at the peak, by the names of PARTS; their sum is `peak_bytes`
    flops           of a step: forward, backward (with what checkpointing computes again), head
    tokens          of a step: padded, real, computed (in the layout), scored
    passes          forward and backward passes of a step and process
    pass_tokens     computed tokens of the largest
    head            the head's schedule there, in words
    peaks           bytes of tensors at most in each part of a step that has parts: sampling, scoring, update
    """

    model: str
    parameters: int
    trainable: int
    device_type: str
    layout: str
    checkpointing: bool
    micro_batch_tokens: int
    parts: dict[str, int]
    flops: dict[str, int]
    tokens: dict[str, int]
    passes: int
    pass_tokens: int
    head: str
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"peak_bytes": self.peak_bytes, "total_flops": self.total_flops}


def parts_of(record: StepRecord, device_type: str, *, with_scoring: bool = False, **beside: int) -> dict[str, int]:
    """Bytes by part at the peak of a run. beside: parts that are in memory all the time and not on record.
    with_scoring: the model has scored batches of other shapes before.

    On the CPU "allocator" is what the process has beyond its tensors at the heap's own peak. On CUDA the parts are what
    torch.cuda.max_memory_allocated counts; what its caching allocator holds beyond that is not predicted.
    """
    peak, named = peak_by_name(record.events(2), record.names)
    parts = dict.fromkeys(PARTS, 0)
    for name, size in named.items():
        parts[_OF_PHASE.get(name, name)] += size
    parts |= beside
    if device_type == "cpu":
        parts["allocator"] = max(mean_peak(record.events(_STEPS)) - peak, 0)
        parts["objects"] = _OBJECT_BYTES
        if record.narrow:
            before = record.narrow["forward"] * KERNELS * KERNEL_BYTES if with_scoring else 0
            parts[LIBRARIES] += _PROBE_BYTES + before
    return {name: size for name, size in parts.items() if size}


def scaled_flops(record: StepRecord, computed: int) -> dict[str, int]:
    """Operations of a whole step of `computed` tokens, from those of the passes on record."""
    scale = computed / max(record.tokens["computed"], 1)
    return {name: int(record.flops[name] * scale) for name in ("forward", "backward", "head")}


def render(plan: StepPlan, alternatives: Sequence[tuple[str, StepPlan]] = ()) -> str:
    """A table of the parts, what dominates, and what other settings would take."""
    size = max(map(len, PARTS)) + 2
    shared = (
        f"{plan.trainable / plan.parameters:.1%} of them train" if plan.trainable < plan.parameters else "all train"
    )
    passes = "pass" if plan.passes == 1 else "passes"
    lines = [
        f"{plan.model}: {_count(plan.parameters)} parameters, {shared}; {plan.device_type}, {plan.layout} layout, "
        f"gradient checkpointing {'on' if plan.checkpointing else 'off'}",
        f"a step: {plan.passes} {passes} of at most {plan.pass_tokens} computed tokens "
        f"(micro_batch_tokens {plan.micro_batch_tokens or 'unlimited'}); "
        f"tokens {plan.tokens['padded']} padded, {plan.tokens['real']} real, {plan.tokens['computed']} computed, "
        f"{plan.tokens['scored']} scored",
        f"head: {plan.head}",
    ]
    if plan.peaks:
        peaks = ", ".join(f"{name} {bytes_ / 2**20:.1f}" for name, bytes_ in plan.peaks.items())
        lines.append(f"tensors at the peak of its parts, MiB: {peaks}")
    lines += [
        "",
        f"{'peak memory':{size}}{'MiB':>10}{'share':>8}",
    ]
    for name, bytes_ in sorted(plan.parts.items(), key=lambda part: -part[1]):
        lines.append(f"  {name:{size - 2}}{bytes_ / 2**20:>10.1f}{bytes_ / plan.peak_bytes:>8.0%}  {PARTS[name]}")
    lines += [f"  {'total':{size - 2}}{plan.peak_bytes / 2**20:>10.1f}", "", f"{'work of a step':{size}}{'GFLOP':>10}"]
    for name, flops in plan.flops.items():
        lines.append(f"  {name:{size - 2}}{flops / 1e9:>10.1f}{flops / max(plan.total_flops, 1):>8.0%}")
    lines += [f"  {'total':{size - 2}}{plan.total_flops / 1e9:>10.1f}", ""]
    largest = max(plan.parts, key=lambda name: plan.parts[name])
    lines.append(f"{largest} dominate{'' if largest.endswith('s') else 's'} the memory: {PARTS[largest]}")
    if alternatives:
        lines.append("with one setting changed:")
        width = max(len(words) for words, _ in alternatives) + 2
        for words, other in alternatives:
            memory, work = other.peak_bytes / plan.peak_bytes - 1, _per_token(other) / _per_token(plan) - 1
            change = f"({memory:+.0%}), work of a token {work:+.0%}"
            lines.append(f"  {words:{width}}{other.peak_bytes / 2**20:>10.1f} MiB {change}")
    return "\n".join(lines) + "\n"


def _per_token(plan: StepPlan) -> float:
    return max(plan.total_flops, 1) / max(plan.tokens["computed"], 1)


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(number)
