"""Timing, peak memory and the record of where a figure comes from. Providers are a dict name -> callable."""

from __future__ import annotations

import csv
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import json
import multiprocessing as mp
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).parent
PACKAGES = ("fastalign", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return ""
    dirty = "+" if git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results") else ""
    return git("rev-parse", "--short", "HEAD") + dirty


def code_digest() -> str:
    """Of what is measured, the sources of fastalign and its kernels: results of other code are not continued."""
    found = hashlib.sha256()
    for folder in ("fastalign", "kernels", "csrc"):
        for path in sorted((ROOT.parent / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc"):
                found.update(str(path.relative_to(ROOT.parent)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "_")
    model = platform.processor() or platform.machine()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        model = next(line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"cpu-{model.replace(' ', '_')}-{torch.get_num_threads()}t"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def canary(device: str, dtype: torch.dtype, size: int = 2048) -> Callable[[], Any]:
    a = torch.randn(size, size, device=device, dtype=dtype)
    return lambda: a @ a


def gpu_state() -> dict[str, Any]:
    """Driver, clocks, power and temperature as nvidia-smi reads them; empty where it does not run."""
    names = {
        "driver_version": "driver", "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts",
        "temperature.gpu": "celsius",
    }  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(names.values(), (part.strip() for part in line.split(",")), strict=True))


@functools.cache
def _l2() -> torch.Tensor:
    """Memory twice as large as the GPU's last cache."""
    size = 2 * getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
    return torch.empty(max(size, 2**26), dtype=torch.int8, device="cuda")


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Name = TypeVar("Name")


def timed(call: Callable[[], Any], device: str, clock: str = "wall") -> float:
    """Seconds of one call. On CUDA between two events, behind a kernel that has emptied the last cache, so that a call
    pays for reading its inputs and not for the launch of its first kernel."""
    if device != "cuda":
        start = CLOCKS[clock]()
        call()
        return CLOCKS[clock]() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _l2().zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    providers: Mapping[Name, Callable[[], Any]],
    *,
    rounds: int,
    device: str = "cpu",
    clock: str = "wall",
    quiet: Quiet | None = None,
    seconds: float = float("inf"),
) -> dict[Name, list[float]]:
    """Seconds per call of each provider: `rounds` rounds over all of them, in a fresh order each, after one warm-up.

    clock: "wall", or "cpu", the time of all threads of this process, for a machine that others keep busy. Set
        OMP_WAIT_POLICY=passive then: threads that spin while they wait take time too.
    quiet: where given, calls wait for the other processes, and are repeated where those came back.
    seconds: a provider that has taken so long in all is left out of the rounds after the third.
    """
    for call in providers.values():
        call()
    times: dict[Name, list[float]] = {name: [] for name in providers}
    order = list(providers)
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        gc.collect()  # and not within a call: a round leaves too little behind for it
        for name in order:
            if len(times[name]) >= 3 and sum(times[name]) > seconds:
                continue
            while True:
                synchronize(device)
                others = None if quiet is None else quiet.wait()
                found = timed(providers[name], device, clock)
                if quiet is None or others is None or (others() or 0) <= quiet.cores:
                    break
            times[name].append(found)
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def resident() -> int:
    """Resident bytes of this process now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def high_water() -> int:
    """Most resident bytes of this process so far, since the last restart."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def restart_high_water() -> None:
    """The high-water mark starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Most bytes that a call holds beyond what there was before it, its results included.

    CUDA: the allocator's. CPU: resident ones of the process; for small calls only a process of its own is exact
    (`peak_memory`).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide as much of this one
    restart_high_water()
    before = resident()
    call()
    return high_water() - before


def cores_of_others() -> Callable[[], float | None]:
    """Starts to count; the result tells how many cores other processes have kept busy since, on average."""

    def busy() -> float:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        own = os.times()
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - sum(own[:4])  # children that have ended are own

    if not Path("/proc/stat").exists():
        return lambda: None
    before, start = busy(), time.perf_counter()
    return lambda: max(0.0, busy() - before) / (time.perf_counter() - start)


class Quiet:
    """Other processes may keep at most `cores` cores busy beside a call: waited for, `patience` seconds in all."""

    def __init__(self, patience: float, cores: float = 0.15) -> None:
        self.deadline, self.cores = time.monotonic() + patience, cores

    def wait(self) -> Callable[[], float | None]:
        """Returns once the machine is quiet; the result tells how quiet it stayed."""
        while True:
            others = cores_of_others()
            time.sleep(1)
            if (others() or 0) <= self.cores:
                return cores_of_others()
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"other processes kept more than {self.cores} cores busy all the time")


def _measure_memory(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], device: str, out: Any) -> None:
    try:
        torch.manual_seed(0)
        call = build(*arguments)
        out.put((peak_bytes(call, device), None))
    except Exception as error:
        out.put((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def peak_memory(
    build: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu", timeout: float = 600
) -> tuple[int | None, str | None]:
    """Peak bytes of one call, in a process of its own: (bytes, None), or (None, the error).

    `build(*arguments)` makes the inputs and returns the call; it is imported by the child, so it must be a module's
    function.
    """
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_memory, args=(build, arguments, device, queue))
    process.start()
    watchdog = threading.Timer(timeout, process.kill)
    watchdog.start()
    try:
        while process.is_alive() and queue.empty():
            process.join(0.1)
        return (
            queue.get(timeout=5)
            if not queue.empty() or process.exitcode == 0
            else (None, f"exit status {process.exitcode}")
        )
    finally:
        watchdog.cancel()
        process.join()


STAMP: dict[str, Callable[[], str]] = {
    "date": lambda: date.today().isoformat(),
    "commit": commit,
    "versions": versions,
    "command": lambda: " ".join(["python", *(Path(a).name if os.sep in a else a for a in sys.argv)]),  # no folders
}


def append_rows(
    bench: str, device: str, rows: list[dict[str, Any]], *, folder: Path | None = None, **known: str
) -> Path:
    """Append rows to results/<device>/<bench>.csv with commit, versions, date and command. Columns may grow, never
    vanish; a file is replaced whole, so that an interruption leaves the old one.

    folder: instead of results/<device>. known: what to write instead of what is found out here.
    """
    folder = ROOT / "results" / device_name(device) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.csv"
    stamp = known | {name: text() for name, text in STAMP.items() if name not in known}
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    everything = old + [row | stamp for row in rows]
    columns = list(dict.fromkeys(key for row in everything for key in row))
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(everything)
    return new.replace(path)


def say(**figures: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}), flush=True)
