"""The demonstration in words, and its table: the same for the terminal and the report."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fastalign.demo.evaluation import Estimate, PolicyScore
from fastalign.demo.settings import DemoSettings

if TYPE_CHECKING:
    from fastalign.demo.experiment import DemoResult


class Column(NamedTuple):
    """A column of the table: its title, the field of `PolicyScore`, how to write it, and what it means."""

    title: str
    field: str
    form: str
    meaning: str
    scale: float = 1.0


COLUMNS = (
    Column("gold reward", "gold", "{:.3f}", "right minus wrong details, over details asked for; at most 1"),
    Column("wins %", "wins", "{:.1f}", "questions with a higher gold reward than SFT's; ties count half", 100.0),
    Column("annotators %", "annotator_wins", "{:.1f}", "how often an annotator prefers the answer to SFT's", 100.0),
    Column("length", "length", "{:.1f}", "tokens of an answer, end of sequence included"),
    Column("KL", "kl", "{:.2f}", "KL(policy ‖ SFT) of an answer, in nats; the SFT model is the reference"),
    Column("cut off %", "cut_off", "{:.1f}", "answers that ran into the limit on new tokens", 100.0),
)
TERMINAL_COLUMNS = COLUMNS[:5]  # so that 80 characters are enough


def cell(score: PolicyScore, column: Column) -> str:
    """`mean ± standard error`; a dash where the model would be compared with itself."""
    estimate: Estimate | None = getattr(score, column.field)
    if estimate is None or (column.field == "kl" and score.wins is None):
        return "–"
    return " ± ".join(column.form.format(value * column.scale) for value in estimate)


def score_table(scores: Iterable[PolicyScore]) -> Table:
    """The table for the terminal."""
    table = Table(box=SIMPLE_HEAD, title="means ± standard errors", title_style="dim", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in TERMINAL_COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    for score in scores:
        table.add_row(score.name, *(cell(score, column) for column in TERMINAL_COLUMNS))
    return table


def introduction(settings: DemoSettings) -> str:
    """What is about to happen."""
    return (
        "A tiny model learns to answer shoppers' questions (SFT), then from annotators who compare answers. The gold "
        "reward counts right and wrong details and ignores length. The annotators go by it too, but a token of length "
        f"is worth {settings.length_bias:g} of their logit. DPO trains on their preferences as they are, R-DPO with "
        f"length_alpha = {settings.alpha:g}; PPO on a reward model of their rankings, at a KL of about "
        f"{settings.target_kl:g} nats."
    )


def verdict(result: DemoResult) -> str:
    """The comparison of the two policies, in one sentence."""
    length = result.shorter
    change = f"{length:.0%} shorter" if length >= 0 else f"{-length:.0%} longer"
    return f"R-DPO's answers are {change} than DPO's, with {result.gold_ratio:.1%} of its gold reward."


def ppo_verdict(result: DemoResult) -> str:
    """What PPO came to, in two sentences."""
    sft, ppo, judge = result.scores["SFT"].gold.mean, result.scores["PPO"].gold.mean, result.reward_model
    return (
        f"PPO raises the gold reward from {sft:.2f} to {ppo:.2f}, {result.ppo_gain:.2f} standard deviations of the SFT "
        f"answers', at a KL of {result.held_kl:.1f} nats (target {result.settings.target_kl:g}). Its reward model "
        f"agrees with the annotators on {judge.annotators.mean:.1%} of new pairs, where {judge.possible:.1%} is "
        f"possible, and with the gold reward on {judge.gold.mean:.1%}."
    )


def cache_line(result: DemoResult) -> str:
    """What the two runs made of the reference cache."""
    parts = [
        f"{name} computed {computed:,} and found {cached:,}" for name, (cached, computed) in result.cached_logps.items()
    ]
    return f"Reference log-probs: {', '.join(parts)} in the cache."


def conclusion(result: DemoResult) -> str:
    """The findings and where the files are, for the terminal (rich markup)."""
    share = result.preferences.longer_chosen_at_equal_gold
    report, plot = escape(str(result.report)), "none: matplotlib is not installed"
    if result.plot is not None:
        plot = escape(str(result.plot))
    return (
        f"[bold]{verdict(result)}\n{ppo_verdict(result)}[/bold]\n"
        f"Of two answers with equal gold rewards the annotators chose the longer one in {share.mean:.0%} of cases.\n"
        f"{cache_line(result)}\n"
        f"\nReport: {report}\nPlot: {plot}\nTime: {result.total_seconds:.0f} s\n"
    )


def next_commands(settings: DemoSettings) -> str:
    """Two things to try: another loss on these preferences, and another demonstration. Lines for a shell."""
    folder, fastalign = settings.output_dir.rstrip("/"), _program()
    dpo = {
        "model_name_or_path": f"{folder}/sft",
        "dataset_name": f"{folder}/preferences.jsonl",
        "cache_dir": f"{folder}/reference-cache",
        "output_dir": f"{folder}/sigmoid-norm",
        "loss_type": "sigmoid_norm",
        "beta": 5,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": 1,
    }
    demo = {"length_alpha": f"{settings.alpha / 2:g}", "output_dir": f"{folder}-half"}
    return (
        "Next, length-normalised DPO on the same preferences, whose reference log-probs are there already:\n"
        f"{_command(f'{fastalign} dpo', dpo)}\n"
        f"or the demonstration with half the length penalty:\n{_command(f'{fastalign} demo', demo)}"
    )


def _command(start: str, flags: dict[str, Any]) -> str:
    words = [start, *(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())]
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > 76:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def _program() -> str:
    """How this process was started, so that the commands shown work where the reader is."""
    given = sys.argv[0]
    if Path(given).name != "fastalign" or shutil.which("fastalign") == given:
        return "fastalign"
    return shlex.quote(os.path.relpath(given))
