"""Judged responses: a prompt with several responses in an order of preference, or one response with a label.

    ranked        {"prompt": ..., "completions": [..., ...], "rank": [2, 1, 2]}       1 is best; equal ranks are ties
    ranked        {"prompt": ..., "completions": [..., ...], "ranking": "B > A = C"}  see `rankings`
    scored        {"prompt": ..., "completions": [..., ...], "score": [0.3, 2, 0.3]}  higher is better
    labelled      {"prompt": ..., "completion": ..., "label": true}                   good or not: a bool, or 0 and 1
                  {"prompt": ..., "completion": ..., "label": 3.5}                    what its reward should be

The prompt is text, a transcript or messages, as in `prompts`; a completion is text, or one assistant message (in a list
or not) where the prompt is messages. The number of completions may differ between rows, and is 2 at least. `tools` and
`chat_template_kwargs` go to the chat template; other columns are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from fastalign.data.conversations import messages_of
from fastalign.data.formats import checked_row, is_empty
from fastalign.data.pairs import Message
from fastalign.data.prompts import Prompt, prompt_parser
from fastalign.data.rankings import dense_ranks, parse_ranking
from fastalign.data.report import Reason, RowError

JUDGEMENTS = ("rank", "ranking", "score")
"""The columns that say how good each of a row's completions is; a row has one of them."""

LIST_COLUMNS = ("prompt", "completions", *JUDGEMENTS, "tools", "chat_template_kwargs", "image", "images")
LABEL_COLUMNS = ("prompt", "completion", "label", "tools", "chat_template_kwargs", "image", "images")

LABEL_TYPES = ("scalar", "binary")
"""What a label is: a number that the reward is to equal, or whether the response is good."""


_LARGEST = float(np.finfo(np.float32).max)  # data sets keep numbers in float32


@dataclass(slots=True)
class Judged:
    """A prompt, its responses by name, and one number for each: a rank (1 is best) or a label."""

    prompt: str | list[Message]
    responses: dict[str, Any]  # text, or one assistant message where the prompt is messages
    values: list[float]
    format: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    scores: list[float] | None = None  # of the responses, where that is what their ranks come from


def list_parser(format: str, has_template: bool, scored: bool = False) -> Callable[[Any], Judged]:
    """From a row of ranked or scored completions to `Judged` with ranks 1, 2, …; RowError for a bad row.

    scored: rows without scores are bad too.
    """
    parse_prompt = prompt_parser(format, has_template)

    def parse(row: Any) -> Judged:
        row = checked_row(row, ("prompt", "completions"))
        ranks, scores, how = ranks_of(row)
        if scored and scores is None:
            raise RowError(Reason.MISSING_KEY, f"no score, which reward temperatures are made of, but {how}")
        prompt = _prompt(row, parse_prompt)
        given = {f"completions[{i}]": value for i, value in enumerate(row["completions"])}
        responses = {name: _response(value, prompt, name) for name, value in given.items()}
        for (a, b), (x, y) in zip(combinations(ranks, 2), combinations(responses, 2), strict=True):
            if a != b and responses[x] == responses[y]:
                raise RowError(Reason.IDENTICAL, f"{x} equals {y}, which is ranked differently")
        return Judged(prompt.prompt, responses, ranks, f"{how}, {_kind(prompt)}", prompt.template_kwargs, scores)

    return parse


def label_parser(format: str, has_template: bool, label_type: str | None, seen: set[str]) -> Callable[[Any], Judged]:
    """From a labelled row to `Judged` with one value; RowError for a bad row.

    label_type: one of LABEL_TYPES, or None to take both: what rows have is added to `seen`.
    """
    parse_prompt = prompt_parser(format, has_template)

    def parse(row: Any) -> Judged:
        row = checked_row(row, ("prompt",))
        missing = [key for key in ("completion", "label") if key not in row]
        if missing:
            raise RowError(Reason.MISSING_KEY, f"no {' and no '.join(missing)}")
        label, kind = _label(row["label"], label_type)
        prompt = _prompt(row, parse_prompt)
        response = _response(row["completion"], prompt, "completion")
        seen.add(kind)
        return Judged(
            prompt.prompt, {"completion": response}, [label], f"labelled, {_kind(prompt)}", prompt.template_kwargs
        )

    return parse


def number_of(value: Any, name: str) -> float:
    """A number that is finite in float32, or RowError naming the column."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(Reason.WRONG_TYPE, f"{name} is {value}, not a finite number")
    if not -_LARGEST <= value <= _LARGEST:  # integers of any size compare
        raise RowError(Reason.WRONG_TYPE, f"{name} is beyond what float32 can hold")
    return float(value)


def ranks_of(row: dict[str, Any]) -> tuple[list[float], list[float] | None, str]:
    """(dense ranks from 1 of a row's completions, their scores if the row has them, the column that was read).

    RowError: not one of JUDGEMENTS, not one value a completion, or nothing that is ranked before something else.
    """
    given = [name for name in JUDGEMENTS if row.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise RowError(Reason.MISSING_KEY, f"one of {', '.join(JUDGEMENTS)} is needed, the row has {found}")
    (name,), completions = given, row["completions"]
    count = len(completions) if isinstance(completions, list) else None
    if name == "ranking":
        if count is None:
            raise RowError(Reason.WRONG_TYPE, "completions is a string, not a list")
        ranks, numbers = parse_ranking(row[name], count), None
    else:
        if not isinstance(row[name], list):
            raise RowError(Reason.WRONG_TYPE, f"{name} is a {type(row[name]).__name__}, not a list of numbers")
        numbers = [number_of(value, f"{name}[{i}]") for i, value in enumerate(row[name])]
        if count != len(numbers):
            found = "a string" if count is None else f"{count} completions"
            raise RowError(Reason.WRONG_TYPE, f"{found} for {len(numbers)} values of {name}")
        ranks = dense_ranks(numbers, higher_is_better=name == "score")
    if len(set(ranks)) < 2:
        raise RowError(Reason.UNSUPPORTED, f"{name} orders nothing: {len(ranks)} completions of one rank")
    return ranks, numbers if name == "score" else None, name


def _label(value: Any, label_type: str | None) -> tuple[float, str]:
    """(the label as a number, its type): booleans and the integers 0 and 1 are binary unless told otherwise."""
    whole = isinstance(value, bool | int) and value in (0, 1)
    if isinstance(value, bool):
        if label_type == "scalar":
            raise RowError(Reason.WRONG_TYPE, "label is a bool, not a number")
        return float(value), "binary"
    number = number_of(value, "label")
    if label_type == "binary" and number not in (0.0, 1.0):
        raise RowError(Reason.WRONG_TYPE, "label is neither 0 nor 1, and labels are binary")
    return number, label_type or ("binary" if whole else "scalar")


def _prompt(row: dict[str, Any], parse: Callable[[Any], Prompt]) -> Prompt:
    return parse(
        {key: row[key] for key in ("prompt", "tools", "chat_template_kwargs", "image", "images") if key in row}
    )


def _kind(prompt: Prompt) -> str:
    return prompt.format.removeprefix("prompt, ")


def _response(value: Any, prompt: Prompt, name: str) -> str | Message:
    """Text behind a prompt of text, an assistant message behind messages."""
    response: str | Message
    if isinstance(prompt.prompt, str):
        if not isinstance(value, str):
            raise RowError(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, and the prompt is text")
        response = value
    else:
        if isinstance(value, str) and "transcript" in prompt.format:
            value = value.strip()  # as `from_transcripts` does
        if not isinstance(value, str | list | dict):
            raise RowError(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not a string or a message")
        messages = messages_of([value] if isinstance(value, dict) else value, name, "assistant")
        if len(messages) != 1:
            reason = Reason.EXTRA_TURNS if messages else Reason.EMPTY_RESPONSE
            raise RowError(reason, f"{name}: {len(messages)} messages after the prompt")
        if messages[0]["role"] != "assistant":
            raise RowError(Reason.WRONG_ROLE, f"{name} has role {messages[0]['role']!r}, not 'assistant'")
        response = messages[0]
    if is_empty(response):
        raise RowError(Reason.EMPTY_RESPONSE, name)
    return response
