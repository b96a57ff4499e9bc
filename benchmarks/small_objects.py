"""Small chunks of malloc that stay for each tensor of a forward, by size: what `fastalign.planning.heap` goes by.

    python benchmarks/small_objects.py --model hh-tiny

Three counts of each pass: after the forward, after the backward, and once the graph is dropped. A malloc of our own
around glibc's counts them, in a process of its own; it needs a C compiler and Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdlib.h>
volatile int counting = 0;
long counts[64];
static void count(void *chunk, long change) {
    if (!chunk || !counting) return;
    size_t size = malloc_usable_size(chunk) + 8;
    if (size < 1024) __sync_fetch_and_add(&counts[size / 16], change);
}
static char early[1 << 16];
static size_t taken;
#define NEXT(type, name) static type next; if (!next) next = (type)dlsym(RTLD_NEXT, name)
typedef void *(*one)(size_t); typedef void *(*two)(size_t, size_t); typedef void *(*again)(void *, size_t);
typedef void (*drop)(void *); typedef int (*aligned)(void **, size_t, size_t);
void *malloc(size_t n) { NEXT(one, "malloc"); void *p = next(n); count(p, 1); return p; }
void free(void *p) {
    if ((char *)p >= early && (char *)p < early + sizeof early) return;
    NEXT(drop, "free"); count(p, -1); next(p);
}
void *calloc(size_t n, size_t m) {
    static int inside; static two next;
    if (!next) {
        if (inside) { void *p = early + taken; taken += (n * m + 15) & ~15UL; return p; }
        inside = 1; next = (two)dlsym(RTLD_NEXT, "calloc"); inside = 0;
    }
    void *p = next(n, m); count(p, 1); return p;
}
void *realloc(void *q, size_t n) { NEXT(again, "realloc"); count(q, -1); void *p = next(q, n); count(p, 1); return p; }
int posix_memalign(void **to, size_t a, size_t n) {
    NEXT(aligned, "posix_memalign"); int failed = next(to, a, n); if (!failed) count(*to, 1); return failed;
}
"""


def measure(model: str, lora: bool, checkpointing: bool, library: str) -> None:
    """Print the counts of one setting; inside a process that has `library` loaded first."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from fastalign.planning.recorder import Recorder

    torch.set_num_threads(1)
    counter = ctypes.CDLL(library)
    counting, counts = ctypes.c_int.in_dll(counter, "counting"), (ctypes.c_long * 64).in_dll(counter, "counts")
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if lora else torch.float32)
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    base = made
    if lora:
        made = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    made.train()
    ids = torch.randint(0, 100, (1, 300))

    def forward() -> torch.Tensor:
        hidden: torch.Tensor = base.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    for _ in range(3):
        forward().float().sum().backward()
    with Recorder() as recorder:
        hidden = forward()
    tensors = sum(event.storage >= 0 and event.size > 0 for event in recorder.events)
    del hidden
    print(f"{'LoRA' if lora else 'full'}, checkpointing {'on' if checkpointing else 'off'}, {tensors} tensors")

    def say(when: str) -> None:
        counting.value = 0
        shares = {16 * i: round(count / tensors, 2) for i, count in enumerate(counts) if count > 0.03 * tensors}
        print(f"  {when:14} {shares}", flush=True)
        counting.value = 1

    counting.value = 1
    hidden = forward()
    say("forward")
    hidden.float().sum().backward()
    say("backward")
    del hidden
    say("graph dropped")
    counting.value = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--measured", nargs=3, help=argparse.SUPPRESS)  # in the process that measures
    arguments = parser.parse_args()
    if arguments.measured:
        lora, checkpointing, library = arguments.measured
        measure(arguments.model, lora == "True", checkpointing == "True", library)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "counter.c"), Path(folder, "counter.so")
        source.write_text(SOURCE)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
        for lora, checkpointing in itertools.product((False, True), repeat=2):
            command = [sys.executable, __file__, "--model", arguments.model]
            command += ["--measured", str(lora), str(checkpointing), str(library)]
            subprocess.run(command, check=True, env=os.environ | {"LD_PRELOAD": str(library)})


if __name__ == "__main__":
    main()
