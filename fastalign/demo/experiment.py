"""The demonstration from beginning to end: SFT, DPO and R-DPO, a reward model and PPO, in miniature."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fastalign.demo.evaluation import Answers, PolicyScore, kl_of, sample_answers, score_policy
from fastalign.demo.language import Annotators, ask
from fastalign.demo.model import build_tokenizer
from fastalign.demo.plot import CurvePoint, can_plot, draw
from fastalign.demo.progress import no_library_bars, step_bar
from fastalign.demo.report import write_report
from fastalign.demo.rlhf import (
    RewardModelScore,
    collect_rankings,
    judge_reward_model,
    reward_batch_size,
    train_ppo,
    train_reward_model,
)
from fastalign.demo.settings import DemoSettings
from fastalign.demo.summary import conclusion, introduction, next_commands, score_table
from fastalign.demo.training import (
    Policy,
    Preferences,
    Watch,
    collect_preferences,
    curve_point,
    train_policy,
    train_sft_model,
)

SFT, DPO, R_DPO, PPO = "SFT", "DPO", "R-DPO", "PPO"
_FOLDERS = {SFT: "sft", DPO: "dpo", R_DPO: "r-dpo"}


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demonstration found. `scores` has the models SFT, DPO, R-DPO and PPO, in this order."""

    settings: DemoSettings
    scores: dict[str, PolicyScore]
    curves: dict[str, list[CurvePoint]]  # of the policies; step 0 is the SFT model
    answers: dict[str, Answers]
    preferences: Preferences
    cached_logps: dict[str, tuple[int, int]]  # DPO and R-DPO: reference log-probs found in the cache, and computed
    reward_model: RewardModelScore
    ppo_kl: list[float]  # of every phase of PPO, nats an answer
    seconds: dict[str, float]  # by phase
    total_seconds: float
    report: Path
    plot: Path | None  # None without matplotlib

    @property
    def shorter(self) -> float:
        """By what share R-DPO's answers are shorter than DPO's."""
        return 1 - self.scores[R_DPO].length.mean / self.scores[DPO].length.mean

    @property
    def gold_ratio(self) -> float:
        """R-DPO's gold reward in units of DPO's."""
        base = self.scores[DPO].gold.mean
        return self.scores[R_DPO].gold.mean / base if base else math.nan

    @property
    def ppo_gain(self) -> float:
        """PPO's gold reward less that of SFT, in standard deviations of the SFT answers' gold rewards."""
        spread = float(self.answers[SFT].rewards.std(ddof=1))
        return (self.scores[PPO].gold.mean - self.scores[SFT].gold.mean) / spread if spread else math.nan

    @property
    def held_kl(self) -> float:
        """Mean KL of the last third of PPO's phases, nats an answer: what its controller held."""
        return float(np.mean(self.ppo_kl[-max(len(self.ppo_kl) // 3, 1) :]))

    def to_json(self) -> dict[str, Any]:
        """All figures, without the answers and the preferences themselves."""
        return {
            "settings": asdict(self.settings) | {"length_alpha": self.settings.alpha},
            "scores": {name: _estimates(asdict(score)) for name, score in self.scores.items()},
            "shorter": self.shorter,
            "gold_ratio": self.gold_ratio,
            "curves": {name: [_estimates(point._asdict()) for point in curve] for name, curve in self.curves.items()},
            "preferences": {
                name: getattr(self.preferences, name)._asdict()
                for name in ("length_difference", "longer_chosen", "longer_chosen_at_equal_gold")
            },
            "reference_logps": {
                name: {"cached": cached, "computed": computed} for name, (cached, computed) in self.cached_logps.items()
            },
            "ppo_gain": self.ppo_gain,
            "ppo_kl": self.ppo_kl,
            "held_kl": self.held_kl,
            "reward_model": _estimates(asdict(self.reward_model)),
            "seconds": self.seconds | {"total": self.total_seconds},
        }


def _estimates(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value._asdict() if hasattr(value, "_asdict") else value for key, value in values.items()}


def run(
    output_dir: str | Path = "demo-output", seed: int = 0, *, console: Console | None = None, **settings: Any
) -> DemoResult:
    """Run the demonstration on the CPU, in one thread, and write everything to `output_dir`.

    A tiny model learns a built-in language by SFT. DPO and R-DPO train it on the preferences of annotators with a bias
    for length; PPO on a reward model of their rankings. Depends on the settings alone: a seed gives the same figures
    again on the same machine.

    Args:
        output_dir: gets report.html, results.json, plot.png (with matplotlib), preferences.jsonl, rankings.jsonl, the
            models in sft/, dpo/, r-dpo/, reward-model/ and ppo/, and the reference log-probs in reference-cache/.
            Created if need be.
        seed: of everything random.
        console: where to write; a Console(quiet=True) writes nothing. Default: standard output.
        settings: further fields of `DemoSettings`.

    Raises ValueError for a setting that makes no sense.
    """
    chosen = DemoSettings(output_dir=str(output_dir), seed=seed, **settings)
    console = console or Console()
    with one_thread(), no_library_bars():
        return _Demo(chosen, console).run()


class _Demo:
    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.folder = Path(settings.output_dir)
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.annotators = Annotators(settings.gold_weight, settings.length_bias)
        rng = random.Random(f"questions {settings.seed}")
        self.questions = [ask(rng) for _ in range(settings.questions)]
        self.curve_questions = [ask(rng) for _ in range(settings.curve_questions)]
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def run(self) -> DemoResult:
        self.console.print(introduction(self.settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._phase("SFT"):
            sft = self._train_sft()
        preferences = collect_preferences(self.tokenizer, self.annotators, self.settings)
        self._write_rows("preferences.jsonl", preferences.rows)
        first = self._answers(sft, self.curve_questions)
        start = curve_point(0, first, kl_of(sft, sft, first))
        policies = {}
        for name, alpha in ((DPO, 0.0), (R_DPO, self.settings.alpha)):
            with self._phase(name):
                policies[name] = self._train_policy(name, alpha, preferences, sft, start)
        with self._phase("reward model"):
            reward_model = self._train_reward_model()
        watch = self._watch(sft, start)
        with self._phase(PPO), step_bar(self.console, PPO, self.settings.ppo_steps) as on_step:
            ppo, ppo_kl = train_ppo(
                self.folder / _FOLDERS[SFT], self.tokenizer, reward_model, self.settings, watch, on_step
            )
        models = {SFT: sft} | {name: policy.model for name, policy in policies.items()} | {PPO: ppo}
        with self._phase("evaluation"):
            answers, scores = self._evaluate(models)
            judged = judge_reward_model(reward_model, self.tokenizer, self.annotators, self.settings)
        curves = {name: policy.curve for name, policy in policies.items()} | {PPO: watch.points}
        logps = {name: (policy.cached_logps, policy.computed_logps) for name, policy in policies.items()}
        return self._finish(
            scores=scores, curves=curves, answers=answers, preferences=preferences, cached_logps=logps,
            reward_model=judged, ppo_kl=ppo_kl,
        )  # fmt: skip

    def _write_rows(self, name: str, rows: list[Any]) -> None:
        with open(self.folder / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _train_sft(self) -> PreTrainedModel:
        steps = -(-self.settings.sft_examples // self.settings.batch_size)
        with step_bar(self.console, SFT, steps) as on_step:
            return train_sft_model(self.folder / _FOLDERS[SFT], self.tokenizer, self.settings, on_step)

    def _watch(self, sft: PreTrainedModel, start: CurvePoint) -> Watch:
        return Watch(self.tokenizer, self.curve_questions, sft, start, self.settings)

    def _train_reward_model(self) -> PreTrainedModel:
        rows = collect_rankings(self.tokenizer, self.annotators, self.settings)
        self._write_rows("rankings.jsonl", rows)
        steps = -(-len(rows) // reward_batch_size(self.settings))
        with step_bar(self.console, "reward model", steps) as on_step:
            return train_reward_model(self.folder / _FOLDERS[SFT], self.tokenizer, rows, self.settings, on_step)

    def _train_policy(
        self, name: str, length_alpha: float, preferences: Preferences, sft: PreTrainedModel, start: CurvePoint
    ) -> Policy:
        steps = -(-len(preferences.rows) // self.settings.batch_size)
        with step_bar(self.console, name, steps) as on_step:
            return train_policy(
                _FOLDERS[name],
                self.folder / _FOLDERS[SFT],
                self.tokenizer,
                preferences,
                self.settings,
                length_alpha=length_alpha,
                watch=self._watch(sft, start),
                on_step=on_step,
            )

    def _evaluate(self, models: dict[str, PreTrainedModel]) -> tuple[dict[str, Answers], dict[str, PolicyScore]]:
        """Answers and score of each model, the first being the one that the others are compared with."""
        answers: dict[str, Answers] = {}
        scores: dict[str, PolicyScore] = {}
        with step_bar(self.console, "evaluation", len(models)) as on_step:
            for name, model in models.items():
                answers[name] = self._answers(model, self.questions)
                scores[name] = score_policy(
                    name, model, answers[name], sft=models[SFT], baseline=answers[SFT], annotators=self.annotators
                )
                on_step("")
        return answers, scores

    def _answers(self, model: PreTrainedModel, questions: list[Any]) -> Answers:
        return sample_answers(
            model, self.tokenizer, questions, seed=self.settings.seed, max_new_tokens=self.settings.max_new_tokens
        )

    def _finish(self, *, curves: dict[str, list[CurvePoint]], answers: dict[str, Answers], **found: Any) -> DemoResult:
        plot, svg = self.folder / "plot.png", None
        plot.unlink(missing_ok=True)  # an earlier run's
        if can_plot():
            svg = draw(curves, {name: given.lengths for name, given in answers.items()}, curves[DPO][0], plot)
        result = DemoResult(
            settings=self.settings,
            curves=curves,
            answers=answers,
            **found,
            seconds=self.seconds,
            total_seconds=time.perf_counter() - self.began,
            report=self.folder / "report.html",
            plot=None if svg is None else plot,
        )
        write_report(result, svg)
        (self.folder / "results.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        self.console.print(score_table(result.scores.values()))
        self.console.print(conclusion(result), highlight=False)
        self.console.print(next_commands(self.settings), markup=False, highlight=False, soft_wrap=True)  # to be copied
        return result

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        self.console.print(f"{name:10} {self.seconds[name]:4.0f} s", style="dim", highlight=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: matrices this small gain nothing from a second one, and threads that wait for each other on a
    busy machine cost a factor of ten. The figures do not depend on the number of cores either."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
