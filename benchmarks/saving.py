"""What a training step waits for a checkpoint, with and without `async_save`.

    python benchmarks/saving.py --model folder-or-name [--saves 8] [--folder where/checkpoints/go]

SFT on random tokens with AdamW, a checkpoint every third step; forms take turns, each in a process of its own. Seconds
are medians over the saves: `waits` in the step, `written` until the checkpoint is in place, `step` beside no save and
`step_while` while one is written. `resident_mb` is the high-water mark of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

EVERY = 3
FORMS = {"synchronous": False, "async_save": True}


def measure(form: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch
    from datasets import Dataset
    from harness import high_water
    from transformers import AutoModelForCausalLM, TrainerCallback

    from fastalign.trainers import SFTConfig, SFTTrainer, checkpoints

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    rng, vocabulary = np.random.default_rng(0), model.config.vocab_size
    mask = [False] + [True] * 127
    rows = [
        {"input_ids": rng.integers(5, vocabulary, len(mask)).tolist(), "completion_mask": mask, "row": i}
        for i in range(64)
    ]
    waits, written, steps, began = [], [], [], [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began[0] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            steps.append((state.global_step % EVERY, time.perf_counter() - began[0]))

    class Timed(SFTTrainer):
        def _save_checkpoint(self, *given: Any) -> None:
            self.saved_at = time.perf_counter()
            super()._save_checkpoint(*given)
            waits.append(time.perf_counter() - self.saved_at)

    original = checkpoints._complete

    def complete(*given: Any) -> None:
        original(*given)
        written.append(time.perf_counter() - trainer.saved_at)

    checkpoints._complete = complete
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        settings = SFTConfig(
            folder, max_steps=EVERY * (arguments.saves + 1), save_strategy="steps", save_steps=EVERY,
            save_total_limit=2, async_save=FORMS[form], use_cpu=not torch.cuda.is_available(), report_to="none",
            disable_tqdm=True, per_device_train_batch_size=4, learning_rate=1e-6, optim="adamw_torch",
            model_name_or_path=arguments.model,
        )  # fmt: skip
        trainer = Timed(model, settings, train_dataset=Dataset.from_list(rows), callbacks=[Clock()])
        trainer.train()
        size = sum(path.stat().st_size for path in next(Path(folder).glob("checkpoint-*")).rglob("*"))
    by_place = {place: [seconds for at, seconds in steps[EVERY:] if at == place] for place in range(EVERY)}
    return {
        "waits": statistics.median(waits[1:-1]), "written": statistics.median(written[1:-1]),
        "step": statistics.median(by_place[0]), "step_while": statistics.median(by_place[1]),
        "checkpoint_mb": size / 2**20, "resident_mb": high_water() / 2**20,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--form", choices=FORMS, help="measure this one here")
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(measure(arguments.form, arguments)))
        return
    import torch
    from harness import append_rows

    torch.set_num_threads(arguments.threads)
    rows = []
    for number in range(arguments.rounds):
        for form in FORMS:
            line = [sys.executable, __file__, *sys.argv[1:], "--form", form]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            print(f"{number} {form:12}", " ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
            name = Path(arguments.model).name
            rows.append({"model": name, "form": form, "round": number} | {k: round(v, 4) for k, v in found.items()})
    append_rows("saving", "cuda" if torch.cuda.is_available() else "cpu", rows)


if __name__ == "__main__":
    main()
