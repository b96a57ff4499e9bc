"""The report: one HTML file that needs no other. Everything that a model wrote is escaped by the template engine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import torch
import transformers
from markupsafe import Markup

from fastalign.demo.language import FACTS, judge_sentence, split_sentences
from fastalign.demo.report_template import TEMPLATE
from fastalign.demo.summary import COLUMNS, cache_line, cell, next_commands, ppo_verdict, verdict

if TYPE_CHECKING:
    from fastalign.demo.experiment import DemoResult

SHOWN_QUESTIONS = 6


class Example(NamedTuple):
    """A question with each model's answer: (sentence, verdict) pairs, gold reward, tokens."""

    prompt: str
    truth: list[str]
    answers: list[tuple[str, list[tuple[str, str]], float, int]]


def write_report(result: DemoResult, svg: str | None) -> None:
    """Write `result` as HTML to result.report. svg: the figure, drawn here and trusted, or None."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(TEMPLATE).render(
        verdict=verdict(result),
        ppo_verdict=ppo_verdict(result),
        rankings=f"{result.settings.ranked_questions:,}",
        target_kl=result.settings.target_kl,
        columns=COLUMNS,
        rows=[(score.name, [cell(score, column) for column in COLUMNS]) for score in result.scores.values()],
        svg=None if svg is None else Markup(svg),
        examples=_examples(result),
        preferences=result.preferences,
        pairs=f"{len(result.preferences.rows):,}",
        cache_line=cache_line(result),
        settings=_settings(result),
        seconds=result.seconds,
        total_seconds=result.total_seconds,
        next_commands=next_commands(result.settings),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        alpha=result.settings.alpha,
        bias=result.settings.length_bias,
        gold_weight=result.settings.gold_weight,
    )
    result.report.write_text(html, encoding="utf-8")


def _examples(result: DemoResult) -> list[Example]:
    """The first questions of the evaluation, not chosen by their answers."""
    questions = next(iter(result.answers.values())).questions[:SHOWN_QUESTIONS]
    examples = []
    for i, question in enumerate(questions):
        answers = []
        for name, found in result.answers.items():
            judged = [(sentence, judge_sentence(question, sentence)) for sentence in split_sentences(found.texts[i])]
            answers.append((name, judged, float(found.rewards[i]), int(found.lengths[i])))
        truth = [FACTS[question.article][detail] for detail in question.details]
        examples.append(Example(question.prompt, truth, answers))
    return examples


def _settings(result: DemoResult) -> dict[str, Any]:
    values = asdict(result.settings) | {"length_alpha": result.settings.alpha}
    return {name: value for name, value in values.items() if name != "output_dir"}
