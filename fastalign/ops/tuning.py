"""Which tile sizes are fastest on the device at hand: candidates, their measurement, and the table they are written to.

Each subject is one entry of a table (`fastalign.kernels._tiles`): a kernel, a case, the sizes in use and sizes that
might be better. A candidate counts only if its result agrees with that of the sizes in use. Sizes are chosen on one
shape, for no choice may look at the number of rows.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import timeit
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.kernels import _tiles
from fastalign.ops import backends

MARGIN = 0.02
"""The share of its time by which a candidate must beat the sizes in use: less may be noise."""

KERNELS = ("fused_forward", "row_kernels", "live_matmul")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Shape:
    """What is timed: tokens, hidden size, vocabulary."""

    n: int = 4096
    hidden_size: int = 4096
    vocab: int = 131072


@dataclass(frozen=True)
class Subject:
    """An entry of the table. `launch(tiles)` runs the kernel and returns a few of its results, float32."""

    kernel: str
    case: str
    current: Any
    candidates: tuple[Any, ...]
    launch: Callable[[Any], Tensor]


@dataclass
class Outcome:
    """Seconds of a subject's sizes in use and of the chosen ones; `refused`: why candidates do not count."""

    subject: Subject
    seconds: float
    chosen: Any
    chosen_seconds: float
    refused: dict[Any, str] = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        before, after = asdict(self.subject.current), asdict(self.chosen)
        return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def timer_for(device: torch.device) -> Timer:
    """Seconds of a launch: on a GPU the median over a tenth of a second, with an L2 that holds nothing of it."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return lambda launch: do_bench(launch, warmup=25, rep=100, return_mode="median") / 1e3
    return lambda launch: min(timeit.repeat(launch, number=1, repeat=3))


def subjects(
    device: torch.device, shape: Shape, dtype: torch.dtype, kernels: tuple[str, ...] = KERNELS
) -> Iterator[Subject]:
    """The entries for operands of `dtype` on `device`."""
    makers = {"fused_forward": _fused, "row_kernels": _rows, "live_matmul": _live}
    for kernel in kernels:
        yield from makers[kernel](device, shape, dtype)


def tune(subject: Subject, timer: Timer) -> Outcome:
    """Time the sizes in use and every candidate; the fastest is chosen if it is faster by more than MARGIN."""
    expected = subject.launch(subject.current)
    seconds = timer(lambda: subject.launch(subject.current))
    outcome = Outcome(subject, seconds, subject.current, seconds * (1 - MARGIN))
    for candidate in subject.candidates:
        try:
            found = subject.launch(candidate)
        except Exception as error:  # too little shared memory, or what this compiler cannot do: there are others
            outcome.refused[candidate] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
            outcome.refused[candidate] = "its result is wrong"
            continue
        needed = timer(lambda candidate=candidate: subject.launch(candidate))  # type: ignore[misc]
        if needed < outcome.chosen_seconds:
            outcome.chosen, outcome.chosen_seconds = candidate, needed
    if outcome.chosen is subject.current:
        outcome.chosen_seconds = seconds
    return outcome


def user_table(arch: str) -> Path:
    """The file that goes before the package's own."""
    return _tiles.USER_TABLES / f"{arch}.json"


def write_table(path: Path, about: str, outcomes: list[Outcome]) -> None:
    """The chosen sizes over what the file holds, in one step: a reader sees the old table or the new one."""
    content: dict[str, Any] = {"about": about, **(_tiles.read_table(path) if path.exists() else {})}
    for outcome in outcomes:
        content.setdefault(outcome.subject.kernel, {})[outcome.subject.case] = asdict(outcome.chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _tiles.table.cache_clear()


def _variants(current: Any, **choices: tuple[Any, ...]) -> tuple[Any, ...]:
    """`current` with every combination of other sizes that is possible at all; itself left out."""
    found = []
    for values in itertools.product(*choices.values()):
        try:
            candidate = replace(current, **dict(zip(choices, values, strict=True)))
        except ValueError:
            continue
        if candidate != current and candidate not in found:
            found.append(candidate)
    return tuple(found)


def _random(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=device)


def _fused(device: torch.device, shape: Shape, dtype: torch.dtype) -> Iterator[Subject]:
    from fastalign.kernels.fused_forward import fused_logps_fwd

    arch, programs = backends.architecture(device), backends.multiprocessors(device)
    hidden = _random(device, shape.n, shape.hidden_size).to(dtype)
    weight = (_random(device, shape.vocab, shape.hidden_size) / shape.hidden_size**0.5).to(dtype)
    targets = torch.arange(shape.n, device=device) % shape.vocab

    def launch(tiles: _tiles.FusedTiles) -> Tensor:
        values, _ = fused_logps_fwd(hidden, weight, None, targets, None, arch=arch, programs=programs, tiles=tiles)
        return values[:3]

    current = _tiles.fused_tiles(arch, dtype)
    choices: dict[str, tuple[Any, ...]] = {"group_n": (8, 16, 32)}
    if dtype == torch.float32:
        choices |= {"block_n": (64, 128), "block_v": (64, 128), "num_stages": (2, 3)}
    else:
        choices |= {"block_v": (128, 256), "block_h": (32, 64, 128), "num_stages": (2, 3, 4, 5), "parts": (2, 4)}
    candidates = tuple(tiles for tiles in _variants(current, **choices) if _fits(tiles, arch, dtype))
    yield Subject("fused_forward", _tiles.fused_case(dtype, aligned=True), current, candidates, launch)


def _fits(tiles: _tiles.FusedTiles, arch: str, dtype: torch.dtype) -> bool:
    """Whether the pipeline's buffers fit shared memory, and the accumulator half of the registers."""
    stages = tiles.num_stages * (tiles.block_n + tiles.block_v) * tiles.block_h * dtype.itemsize
    accumulator = tiles.block_n * tiles.block_v // (32 * tiles.num_warps)
    return stages <= _tiles.SHARED_MEMORY_LIMIT.get(arch, 65_536) and accumulator <= 128


def _rows(device: torch.device, shape: Shape, dtype: torch.dtype) -> Iterator[Subject]:
    """Statistics and gradient of a float32 tile, one after the other; `dtype` is that of the gradient."""
    from fastalign.kernels import row_kernels

    arch = backends.architecture(device)
    tile = _random(device, min(shape.n, 2048), shape.vocab)
    n = len(tile)
    targets = torch.arange(n, device=device) % shape.vocab
    ones, argmax = torch.ones(n, device=device), torch.empty(0, dtype=torch.int64, device=device)
    out = torch.empty_like(tile, dtype=dtype)

    def launch(tiles: _tiles.RowTiles) -> Tensor:
        values = torch.zeros(6, n, device=device)
        values[0] = -torch.inf
        row_kernels.row_stats_fwd(tile, None, targets, 0, values, argmax, tiles=tiles)
        log_sum = values[1].log()
        row_kernels.row_grad_bwd(tile, None, targets, 0, values[0], log_sum, ones, ones, None, out, tiles=tiles)
        return torch.cat([values[:3], out[:, -64:].float().t()])

    current = _tiles.row_tiles(shape.vocab, arch)
    candidates = _variants(current, block=(1024, 2048, 4096, 8192), num_warps=(2, 4, 8, 16))
    candidates = tuple(tiles for tiles in candidates if 4 <= tiles.block // (32 * tiles.num_warps) <= 32)
    yield Subject("row_kernels", "all", current, candidates, launch)


def _live(device: torch.device, shape: Shape, dtype: torch.dtype) -> Iterator[Subject]:
    """grad_hidden and grad_weight over half of a tile's rows, picked by index."""
    from fastalign.kernels import live_gemm

    arch, programs = backends.architecture(device), backends.multiprocessors(device)
    n, columns = min(shape.n, 2048), min(shape.vocab, 16384)
    grad, hidden = _random(device, n, columns).to(dtype), _random(device, n, shape.hidden_size).to(dtype)
    weight = (_random(device, columns, shape.hidden_size) / columns**0.5).to(dtype)
    index = torch.arange(0, n, 2, device=device)
    count = torch.full((1,), len(index), dtype=torch.int32, device=device)
    packed = torch.zeros(-(-len(index) // live_gemm.PAD) * live_gemm.PAD, shape.hidden_size, dtype=dtype, device=device)
    packed[: len(index)] = hidden[index] / n**0.5

    def rows(tiles: Any) -> Tensor:
        out = torch.zeros(n, shape.hidden_size, device=device)
        live_gemm.rows_matmul(
            grad, weight, count, out, index=index, out_index=index, arch=arch, programs=programs, tiles=tiles
        )
        return out[:, :64]

    def depth(tiles: Any) -> Tensor:
        out = torch.empty(columns, shape.hidden_size, device=device)
        live_gemm.depth_matmul(grad, packed, count, out, index=index, arch=arch, programs=programs, tiles=tiles)
        return out[:64]

    for gathered, launch in (("rows", rows), ("depth", depth)):
        current = live_gemm.gemm_tiles(arch, dtype, gathered=gathered)
        candidates = _variants(
            current, block_n=(128, 256), block_k=(32, 64), num_stages=(3, 4, 5, 6, 7), group_m=(8, 16, 32)
        )
        yield Subject("live_matmul", live_gemm.gemm_case(dtype, gathered=gathered), current, candidates, launch)
