"""What every preference format is turned into: one prompt and two responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

Message = dict[str, Any]


@dataclass(slots=True)
class TextPair:
    """A prompt and two different, non-empty responses as plain text."""

    prompt: str
    chosen: str
    rejected: str
    format: str


@dataclass(slots=True)
class ChatPair:
    """A non-empty prompt and two different, non-empty assistant messages, for a chat template."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    format: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Pair = TextPair | ChatPair


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many leading elements the two have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
