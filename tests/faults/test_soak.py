"""Two thousand steps in one process, once it is warm: memory and open files stay what they were.

What libraries and the allocator keep for shapes they have seen grows for some 2,500 steps of new shapes, to about 40
KiB; with one shape it is there after a thousand.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from fastalign.trainers import DPOConfig, DPOTrainer

WARM_UP, STEPS, EVERY = 3000, 5000, 10
LAST = STEPS - 50  # from here on what is in cycles is kept, to be looked at


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names.split()]


class Gauge(TrainerCallback):
    """(step, bytes malloc has handed out, blocks Python has, resident bytes, open files, mapped files), every EVERY
    steps.

    Garbage in cycles is collected first, and free memory given back: Python collects a cycle that lived through a
    checkpoint some thousand steps later (once a quarter of all it has is new), and the allocator extends its heap by
    256 KiB at a time; both look like growth for a while. What is resident depends on huge pages and on what else the
    machine does; it is shown. The log history, which Trainer keeps whole, is emptied.
    """

    def __init__(self) -> None:
        self.seen = np.zeros((LAST // EVERY, 6))  # which does not grow itself
        self._c = ctypes.CDLL(None)
        self._c.mallinfo2.restype = Mallinfo

    def on_step_end(self, args, state, control, **kwargs) -> None:
        step = state.global_step
        if step == 1:
            gc.collect()
            gc.freeze()  # what is there by now is not looked through again and again
        if step == LAST:
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
        if step < LAST and step % EVERY == 0:
            state.log_history.clear()
            gc.collect()
            self._c.malloc_trim(0)
            heap = self._c.mallinfo2()
            self.seen[step // EVERY] = (
                step, heap.uordblks + heap.hblkhd, sys.getallocatedblocks(), resident(),
                len(os.listdir("/proc/self/fd")), mapped_files(),
            )  # fmt: skip


def resident() -> int:
    """Bytes, those that were swapped out included."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 2**10


def mapped_files() -> int:
    return sum("/" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def cycles():
    """What was found in cycles while gc.DEBUG_SAVEALL was set."""
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.unfreeze()


def make(folder: Path, gauge: TrainerCallback) -> DPOTrainer:
    """A new shape in nearly every batch, a checkpoint every 200 steps, an evaluation every 250."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, pad_token_id=0, eos_token_id=1, **sizes))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rng = np.random.default_rng(0)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: rng.integers(3, 61, rng.integers(2, 24)).tolist() for name in columns} | {"row": i} for i in range(1000)
    ]
    config = DPOConfig(
        output_dir=str(folder / "out"), cache_dir=str(folder / "cache"), max_steps=STEPS, use_cpu=True,
        report_to="none", disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-4, logging_steps=50,
        save_strategy="steps", save_steps=200, save_total_limit=2, eval_strategy="steps", eval_steps=250,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:20]),
        processing_class=tokenizer, callbacks=[gauge],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # what is printed is kept by the test
    return trainer


def described(found: object) -> str:
    """A function's or class's name, of other objects that of their class."""
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"


@pytest.mark.long
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc's allocator")
def test_two_thousand_steps(tmp_path, capsys, cycles):
    """What a straight line gains over the 2,000 steps is less than three standard deviations of a single reading."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gauge = Gauge()
    trainer = make(tmp_path, gauge)
    trainer.train()
    assert trainer.state.global_step == STEPS

    gc.collect()
    ours = {name for found in cycles if (name := described(found)).startswith(("fastalign.", "torch.Tensor"))}
    assert cycles  # of others: the look itself works
    assert not ours

    steps, heap, blocks, memory, files, maps = gauge.seen[gauge.seen[:, 0] >= WARM_UP].T
    doubled = np.flatnonzero(np.abs(np.diff(heap)) > 2**20)  # a table of the interpreter's, which is no slope
    assert len(doubled) <= 1
    for place in doubled:
        heap[place + 1 :] -= heap[place + 1] - heap[place]
    (growth, noise), (more, spread) = trend(steps, heap), trend(steps, blocks)
    with capsys.disabled():
        print(
            f"\nsoak: {len(steps) * EVERY} steps, heap of {heap[-1] / 2**20:.1f} MiB: {growth / 2**10:+.1f} KiB"
            f" ({growth / len(steps) / EVERY:.1f} bytes a step), a reading's noise is {noise / 2**10:.1f} KiB; Python"
            f" {more:+.0f} blocks, noise {spread:.0f}; resident {memory[0] / 2**20:.1f} → {memory[-1] / 2**20:.1f} MiB;"
            f" {int(files[0])} → {int(files[-1])} open files, {int(maps[0])} → {int(maps[-1])} mappings of files"
        )
    assert files.max() <= files[0] + 2  # a checkpoint being written may hold one
    assert files[-1] <= files[0]
    assert maps[-1] <= maps[0]
    assert growth <= 3 * noise
    assert more <= 3 * spread
    assert noise <= 64 * 2**10  # else a leak could hide in it
    assert spread <= 1000


def trend(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """What a straight line gains, and the standard deviation around it."""
    slope, start = np.polyfit(steps, values, 1)
    return slope * (steps[-1] - steps[0]), float(np.std(values - (slope * steps + start)))
