"""A DPO training step end to end against TRL's DPOTrainer and two loops by hand: same model, pairs, batches, float32.

    <python with trl> benchmarks/dpo_step.py --model hh-tiny --data hh_harmless.jsonl.gz [--rounds 3] [--steps 12]

Without gradient checkpointing. Every run is a process of its own; rounds interleave the providers:

    fastalign                 token_layout="auto": prompts shared, where the model allows it
    fastalign packed, padded  the other layouts
    trl, trl precomputed      its reference in memory, or its log-probs computed beforehand
    naive padded              a loop by hand: one forward of the padded batch, logits of completion tokens alone, the
                              reference's log-probs computed beforehand
    naive one by one          the same, one sequence a forward and one pair a backward: nothing is padded

Step time: the median over steps after the first two, then the median over rounds; tokens a second are those of the
sequences, without padding. Peak memory: the high-water mark of the process less what was resident after its imports,
over the whole run (`peak_mib`) and from the first step on (`peak_training_mib`). Reference: tokens a second of
computing all log-probs before training, model in memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import harness

LAYOUTS = {"fastalign": "auto", "fastalign packed": "packed", "fastalign padded": "padded"}
PEERS = ("trl", "trl precomputed")
NAIVE = ("naive padded", "naive one by one")
PROVIDERS = (*LAYOUTS, *PEERS, *NAIVE)
BETA, LEARNING_RATE = 0.1, 5e-5


def pairs(data: str, model: str, count: int, max_length: int) -> list[dict[str, Any]]:
    """The first pairs of the file that are valid and fit, as messages."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from transformers import AutoTokenizer
    from trl_dpo_curve import select

    return select(data, AutoTokenizer.from_pretrained(model), count, max_length)[1]


def tokenised(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    from fastalign.data import prepare_preferences

    examples = prepare_preferences(rows, tokenizer, max_length=max_length).dataset
    return [{name: [int(i) for i in example[name]] for name in COLUMNS} for example in examples]


COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class Clock:
    """Seconds and losses of each step; the high-water mark of memory starts again with the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        if not self.seconds:
            harness.restart_high_water()
        self.start = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(provider: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = pairs(arguments.data, arguments.model, arguments.steps * arguments.batch, arguments.max_length)
    examples = tokenised(rows, tokenizer, arguments.max_length)
    sums = [sum(len(e[n]) for n in COLUMNS) + len(e["prompt_ids"]) for e in examples]
    tokens = [sum(sums[i : i + arguments.batch]) for i in range(0, len(sums), arguments.batch)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if provider in NAIVE:
            from naive_dpo import NaiveLoop

            loop = NaiveLoop(
                arguments.model, batch=arguments.batch, padded=provider == "naive padded", beta=BETA,
                learning_rate=LEARNING_RATE, clock=clock,
            )  # fmt: skip
            gc.collect()
            bare = harness.resident()
            reference_seconds, before = loop.run(examples)
        else:
            dataset, load = Dataset.from_list(rows), _ours if provider in LAYOUTS else _trl
            construct = load(provider, arguments, folder)
            gc.collect()
            bare = harness.resident()
            trainer, reference_seconds = construct(train_dataset=dataset, processing_class=tokenizer, clock=clock)
            before = harness.high_water()
            trainer.train()
        training = harness.high_water()
    rates = [count / seconds for count, seconds in zip(tokens, clock.seconds, strict=True)]
    found = {
        "step_seconds": statistics.median(clock.seconds[2:]), "tokens_per_second": statistics.median(rates[2:]),
        "peak_mib": (max(before, training) - bare) / 2**20, "peak_training_mib": (training - bare) / 2**20,
        "bare_mib": bare / 2**20, "first_loss": clock.losses[0], "last_loss": clock.losses[-1],
    }  # fmt: skip
    return found | ({} if not reference_seconds else {"reference_tokens_per_second": sum(tokens) / reference_seconds})


# ---- trainers


def _callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(logs["loss"])

    return Timed()


def _options(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": arguments.batch, "max_steps": arguments.steps,
        "max_length": arguments.max_length, "learning_rate": LEARNING_RATE, "beta": BETA, "bf16": False,
        "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "seed": 0, "disable_tqdm": True,
    }  # fmt: skip


def _ours(provider: str, arguments: argparse.Namespace, folder: str) -> Any:
    from fastalign import DPOConfig, DPOTrainer

    args = DPOConfig(**_options(arguments, folder), cache_dir=f"{folder}/cache", token_layout=LAYOUTS[provider])

    def construct(clock: Clock, **given: Any) -> tuple[Any, float]:
        trainer = DPOTrainer(arguments.model, args=args, callbacks=[_callback(clock)], **given)
        assert trainer.reference_cache.report is not None
        return trainer, trainer.reference_cache.report.seconds

    return construct


def _trl(provider: str, arguments: argparse.Namespace, folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    seconds = []

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *arguments: Any, **given: Any) -> Any:
            start = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments, **given)
            seconds.append(time.perf_counter() - start)
            return found

    args = DPOConfig(**_options(arguments, folder), precompute_ref_log_probs=provider.endswith("precomputed"))

    def construct(clock: Clock, **given: Any) -> tuple[Any, float]:
        models = {
            name: AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
            for name in ("model", "ref_model")
        }
        return Timed(**models, args=args, callbacks=[_callback(clock)], **given), sum(seconds)

    return construct


# ---- the comparison


def compared(name: str, middle: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """A row of the record: figures of a provider, and their ratios to the others'."""
    figures = middle[name]
    row: dict[str, Any] = {"provider": name, "model": Path(arguments.model).name, "batch": arguments.batch} | figures
    for peer in PEERS:
        if peer in middle:
            own, other = figures, middle[peer]
            row[f"time_over_{peer.replace(' ', '_')}"] = own["step_seconds"] / other["step_seconds"]
            row[f"memory_over_{peer.replace(' ', '_')}"] = own["peak_training_mib"] / other["peak_training_mib"]
    if found := [middle[peer]["step_seconds"] for peer in NAIVE if peer in middle]:
        row["time_over_better_naive"] = figures["step_seconds"] / min(found)
    rate = middle.get("trl precomputed", {}).get("reference_tokens_per_second")
    if rate and "reference_tokens_per_second" in figures:
        row["reference_rate_over_trl"] = figures["reference_tokens_per_second"] / rate
    return row


def plot(middle: dict[str, dict[str, Any]], path: Path) -> None:
    """Useful tokens a second and peak memory of each provider; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.5 * len(middle) + 1.2), sharey=True)
    titles = {"tokens_per_second": "useful tokens a second", "peak_training_mib": "peak memory of training, MiB"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = [figures[key] for figures in middle.values()]
        colours = ["tab:blue" if name in LAYOUTS else "tab:grey" for name in middle]
        axis.bar_label(axis.barh(list(middle), values, color=colours), fmt="{:,.0f}", padding=3)
        axis.set_title(title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--only", choices=PROVIDERS, help="run one provider in this process and print its figures")
    arguments = parser.parse_args()
    if arguments.only:
        print("RESULT " + json.dumps(train(arguments.only, arguments)))
        return
    names = list(arguments.providers)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for round_number in range(arguments.rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            done = subprocess.run([sys.executable, "-P", *sys.argv, "--only", name], capture_output=True, text=True)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                print(done.stderr[-2000:], file=sys.stderr)
                raise SystemExit(f"{name} failed with exit status {done.returncode}")
            found[name].append(json.loads(line.removeprefix("RESULT ")))
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    rows = [compared(name, middle, arguments) for name in names]
    for row in rows:
        harness.say(**row)
    if not arguments.no_save:
        plot(middle, harness.append_rows("dpo_step", "cpu", rows).with_suffix(".svg"))


if __name__ == "__main__":
    main()
