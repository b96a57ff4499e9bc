"""Cells in a process of their own: one that dies is replaced, and its end is put down to the provider at work."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import sys
from pathlib import Path
from typing import Any

from cells import Cell, Fatal, Row, short


def serve(connection: Any, device: str, threads: int | None, log: str | None) -> None:
    """Answer cells until there is None: ("at", provider) …, then ("rows", …) or ("fatal", why)."""
    if log is not None:  # compilers and libraries have much to say
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    import gc

    import harness
    import source_tree  # noqa: F401
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    state = harness.gpu_state() if device == "cuda" else {}
    connection.send(("ready", {"name": harness.device_name(device), "driver": state.get("driver", "")}))
    while (order := connection.recv()) is not None:
        cell, skip = order
        try:
            module = importlib.import_module(cell.module)
            gc.collect()
            gc.freeze()  # the libraries' objects are no one's garbage: collecting between rounds takes less
            rows = module.run(cell, lambda name: connection.send(("at", name)), skip)
            if device == "cuda":
                found = {name: value for name, value in harness.gpu_state().items() if name != "driver"}
                rows = [row | found for row in rows]
                gc.collect()
                torch.cuda.empty_cache()
            connection.send(("rows", rows))
        except Fatal as error:
            connection.send(("fatal", str(error)))
            os._exit(1)
        except Exception as error:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            connection.send(("rows", [{"provider": "", "error": short(error)}]))


class Worker:
    """The process that measures, started when it is needed."""

    def __init__(self, device: str, *, threads: int | None = None, log: Path | None = None) -> None:
        self.device, self.threads, self.log = device, threads, log
        self.about: dict[str, str] = {}
        self._process: Any = None
        self._connection: Any = None

    def start(self) -> dict[str, str]:
        """The device's name and driver."""
        if self._process is None:
            context = mp.get_context("spawn")
            self._connection, other = context.Pipe()
            log = None if self.log is None else str(self.log)
            self._process = context.Process(target=serve, args=(other, self.device, self.threads, log), daemon=True)
            self._process.start()
            other.close()
            kind, value = self._receive(300)
            if kind != "ready":
                raise RuntimeError(f"the measuring process does not start: {value}")
            self.about = value
        return self.about

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def run(self, cell: Cell, limit: float) -> list[Row]:
        """The cell's rows. limit: seconds without a word after which a provider counts as stuck."""
        skip: dict[str, str] = {}
        while True:
            self.start()
            self._connection.send((cell, dict(skip)))
            at = ""
            while True:
                kind, value = self._receive(limit)
                if kind != "at":
                    break
                at = value
            if kind == "rows":
                return value
            self.stop()
            if at in ("", "inputs", "timing") or at in skip:
                return [{"provider": at, "error": value}]
            skip[at] = value

    def _receive(self, limit: float) -> tuple[str, Any]:
        if not self._connection.poll(limit):
            return "stuck", f"no answer in {limit:.0f} s"
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return "dead", f"the process ended with status {self._process.exitcode}"
