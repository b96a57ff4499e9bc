"""Multi-turn rows: message lists and transcripts."""

from __future__ import annotations

import re
from typing import Any

from fastalign.data.pairs import ChatPair, Message, Pair, TextPair, common_length
from fastalign.data.report import Reason, RowError

ROLES = ("system", "developer", "user", "assistant", "tool")

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(f"({_HUMAN}|{_ASSISTANT})")
_ROLE_OF = {_HUMAN: "user", _ASSISTANT: "assistant"}


# Transcripts ----------------------------------------------------------------------------------------------------------


def transcripts_of(row: dict[str, Any]) -> tuple[str, str] | None:
    """The two whole transcripts of a row of strings, or None if it holds something else."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is None:
        return (chosen, rejected) if chosen.startswith(_HUMAN) or rejected.startswith(_HUMAN) else None
    if not prompt.startswith(_HUMAN):
        return None
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return chosen, rejected
    return prompt + chosen, prompt + rejected


def from_transcripts(chosen: str, rejected: str, *, chat: bool) -> Pair:
    """The pair of two transcripts that are equal up to their last assistant turn, the response.

    With `chat` it is messages of stripped text, otherwise the text as it stands, responses beginning after the colon.
    RowError: no common turns, anything but one assistant turn after them.
    """
    turns = {"chosen": _turns(chosen), "rejected": _turns(rejected)}
    common = _common_turns(turns["chosen"], turns["rejected"])
    for name, own in turns.items():
        if not own or own[-1][0] != _ASSISTANT:
            raise RowError(Reason.WRONG_ROLE, f"{name} does not end with an Assistant turn")
    if not common:
        raise RowError(Reason.NO_COMMON_PROMPT, "chosen and rejected differ in their first turn")
    for name, own in turns.items():
        if len(own) > len(common) + 1:
            extra = len(own) - len(common)
            raise RowError(Reason.EXTRA_TURNS, f"{name}: {extra} turns after {len(common)} common ones")
    if common[-1][0] != _HUMAN:
        raise RowError(Reason.WRONG_ROLE, "the common turns end with an Assistant turn")
    if not chat:
        prompt = "".join(header + text for header, text in [*common, (_ASSISTANT, "")])
        return TextPair(prompt, turns["chosen"][-1][1], turns["rejected"][-1][1], "transcript as text")
    chosen_messages, rejected_messages = (
        [{"role": _ROLE_OF[header], "content": text.strip()} for header, text in own] for own in turns.values()
    )
    return ChatPair(chosen_messages[:-1], chosen_messages[-1], rejected_messages[-1], "transcript as chat")


def is_transcript(value: Any) -> bool:
    """Whether a value is text that begins with a Human turn."""
    return isinstance(value, str) and value.startswith(_HUMAN)


def split_transcript(transcript: str, *, chat: bool) -> tuple[str | list[Message], str | Message | None]:
    """(everything up to the header of the answer, the last Assistant turn or None); as in `from_transcripts`.

    A transcript that ends with a Human turn, or with an Assistant's header and nothing behind it, has no answer.
    RowError: nothing comes before the answer, or an Assistant turn does.
    """
    turns = _turns(transcript)
    last = turns.pop()[1] if turns[-1][0] == _ASSISTANT else None
    if not turns or turns[-1][0] != _HUMAN:
        raise RowError(Reason.WRONG_ROLE, "the transcript has no Human turn before its last Assistant turn")
    answered = last is not None and last.strip()
    if not chat:
        prompt = "".join(header + text for header, text in [*turns, (_ASSISTANT, "")])
        return prompt, last if answered else None
    messages = [{"role": _ROLE_OF[header], "content": text.strip()} for header, text in turns]
    return messages, {"role": "assistant", "content": answered} if answered else None


def _turns(transcript: str) -> list[tuple[str, str]]:
    """[(header, text), ...]; nothing for a text that does not begin with a header."""
    before, *parts = _TURN.split(transcript)
    return [] if before else list(zip(parts[::2], parts[1::2], strict=True))


def _common_turns(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """The turns both begin with, leaving at least one to each."""
    return chosen[: common_length(chosen[:-1], rejected[:-1])]


# Messages -------------------------------------------------------------------------------------------------------------


def from_messages(row: dict[str, Any]) -> ChatPair:
    """The pair of a row of message lists; a string stands for one message.

    RowError: malformed messages, no common prompt, or responses other than one assistant message after it.
    """
    chosen = messages_of(row["chosen"], "chosen", "assistant")
    rejected = messages_of(row["rejected"], "rejected", "assistant")
    shared = _common_turns(chosen, rejected)
    given = row.get("prompt")
    if given is None:
        if not shared:
            raise RowError(Reason.NO_COMMON_PROMPT, "chosen and rejected have no first message in common")
        prompt = shared
    else:
        prompt = messages_of(given, "prompt", "user")
        if isinstance(given, str) and shared:  # the responses are whole conversations, prompt repeats a message of them
            if not any(message["content"].strip() == given.strip() for message in shared):
                raise RowError(Reason.NO_COMMON_PROMPT, "prompt is no message that chosen and rejected share")
            prompt = shared
    if prompt and prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(Reason.WRONG_ROLE, f"the prompt ends with role {prompt[-1]['role']!r}, not 'user' or 'tool'")
    return ChatPair(
        prompt,
        _response(chosen, prompt, "chosen"),
        _response(rejected, prompt, "rejected"),
        f"messages, {'implicit' if given is None else 'explicit'} prompt",
    )


def _response(messages: list[Message], prompt: list[Message], name: str) -> Message:
    if prompt and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages:
        raise RowError(Reason.EMPTY_RESPONSE, f"{name} has no message of its own")
    if len(messages) > 1:
        raise RowError(Reason.EXTRA_TURNS, f"{name}: {len(messages)} messages after the prompt")
    if messages[0]["role"] != "assistant":
        raise RowError(Reason.WRONG_ROLE, f"{name} has role {messages[0]['role']!r}, not 'assistant'")
    return messages[0]


def messages_of(value: str | list[Any], name: str, role: str) -> list[Message]:
    """A list of checked messages; a string stands for one message of `role`. RowError: a malformed message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    """A checked message without None values, `content` always a string."""
    if not isinstance(message, dict):
        raise RowError(Reason.WRONG_TYPE, f"{where} is a {type(message).__name__}, not a message")
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message:
        raise RowError(Reason.MISSING_KEY, f"{where} has no role")
    if message["role"] not in ROLES:
        raise RowError(Reason.WRONG_ROLE, f"{where} has an unknown role; known are {', '.join(ROLES)}")
    if "content" not in message and "tool_calls" not in message:
        raise RowError(Reason.MISSING_KEY, f"{where} has no content")
    content = message.setdefault("content", "")
    if not isinstance(content, str):
        raise RowError(Reason.WRONG_TYPE, f"the content of {where} is a {type(content).__name__}, not a string")
    return message
