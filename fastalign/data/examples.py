"""Rows to learn from by cross-entropy, in the formats people have, turned into text or messages with a prompt or none.

    text                  {"text": str}, the column's name being an option: all of it
    messages              {"messages": [{"role", "content"}, ...]}: all of it, or what the assistant says
    prompt, completion    {"prompt": ..., "completion": ...}, each text or messages: the completion, or all of it
    transcripts           "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns as text, or as a prompt with a completion
    preferences           {"chosen", "rejected"} with or without "prompt": the chosen response as a completion

The first three are TRL's. `tools` (list or JSON text) and `chat_template_kwargs` (dict) go to the chat template; any
other column is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastalign.data.conversations import is_transcript, messages_of, split_transcript
from fastalign.data.formats import (
    checked_row,
    is_empty,
    needs_chat,
    pair_parser,
    takes_no_template,
    template_kwargs_of,
    uses_chat,
)
from fastalign.data.pairs import Message, TextPair
from fastalign.data.report import Reason, RowError


@dataclass(slots=True)
class TextExample:
    """Plain text after a prompt, or without one (None)."""

    prompt: str | None
    text: str
    format: str


@dataclass(slots=True)
class ChatExample:
    """Messages, the first `prompt_length` of which are the prompt (0: there is none)."""

    messages: list[Message]
    prompt_length: int
    format: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Example = TextExample | ChatExample


@dataclass(frozen=True)
class ExampleParser:
    """From a row to its `Example`; RowError for a bad row.

    format                  see `formats.FORMATS`
    has_template            whether the tokenizer has a chat template
    completion_only_loss    True: every example has a prompt; conversations are split before their last message
    text_field              name of the column of plain text
    """

    format: str
    has_template: bool
    completion_only_loss: bool | None = None
    text_field: str = "text"

    def __post_init__(self) -> None:
        uses_chat(self.format, self.has_template)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read; image columns only to refuse them."""
        return (
            self.text_field, "messages", "prompt", "completion", "chosen", "rejected", "tools", "chat_template_kwargs",
            "image", "images",
        )  # fmt: skip

    def __call__(self, row: Any) -> Example:
        row = checked_row(row, (), ("prompt", "completion", "messages", self.text_field))
        template_kwargs = template_kwargs_of(row)
        example = self._find(row)
        if isinstance(example, ChatExample):
            example.template_kwargs = template_kwargs
        else:
            takes_no_template(template_kwargs)
        _check(example)
        return example

    @property
    def _chat(self) -> bool:
        return uses_chat(self.format, self.has_template)

    def _find(self, row: dict[str, Any]) -> Example:
        if "prompt" in row and "completion" in row:
            return self._completion(row["prompt"], row["completion"])
        if "chosen" in row and "rejected" in row:
            return self._chosen(row)
        if "messages" in row:
            if isinstance(row["messages"], str):
                raise RowError(Reason.WRONG_TYPE, "messages is a str, not a list of messages")
            needs_chat(self._chat, self.has_template)
            return self._conversation(messages_of(row["messages"], "messages", "user"), "messages")
        if self.text_field in row:
            return self._text(row[self.text_field])
        accepted = f"{self.text_field!r}, 'messages', 'prompt' and 'completion', 'chosen' and 'rejected'"
        raise RowError(Reason.MISSING_KEY, f"none of {accepted}")

    def _completion(self, prompt: str | list[Any], completion: str | list[Any]) -> Example:
        if isinstance(prompt, str) and isinstance(completion, str) and self.format != "chat":
            if not is_transcript(prompt):
                return TextExample(prompt, completion, "text, prompt and completion")
            turns, answer = split_transcript(prompt, chat=self._chat)
            if answer is not None:
                raise RowError(Reason.WRONG_ROLE, "the prompt ends with an Assistant turn")
            if isinstance(turns, str):
                return TextExample(turns, completion, "transcript as text, prompt and completion")
            response = {"role": "assistant", "content": completion.strip()}
            return ChatExample([*turns, response], len(turns), "transcript as chat, prompt and completion")
        needs_chat(self._chat, self.has_template)
        messages = messages_of(prompt, "prompt", "user")
        responses = messages_of(completion, "completion", "assistant")
        if responses and responses[0]["role"] != "assistant":
            raise RowError(Reason.WRONG_ROLE, f"completion[0] has role {responses[0]['role']!r}, not 'assistant'")
        if not messages:
            raise RowError(Reason.EMPTY_PROMPT, "it has no messages")
        return ChatExample([*messages, *responses], len(messages), "messages, prompt and completion")

    def _chosen(self, row: dict[str, Any]) -> Example:
        pair = pair_parser(self.format, self.has_template)(row)
        how = f"{pair.format}, chosen"
        if isinstance(pair, TextPair):
            return TextExample(pair.prompt, pair.chosen, how)
        return ChatExample([*pair.prompt, pair.chosen], len(pair.prompt), how)

    def _text(self, text: str | list[Any]) -> Example:
        if not isinstance(text, str):
            raise RowError(Reason.WRONG_TYPE, f"{self.text_field} is a {type(text).__name__}, not a string")
        if self.format == "chat" and not is_transcript(text):
            raise RowError(Reason.UNSUPPORTED, "format='chat' needs messages, or a prompt and a completion")
        if not is_transcript(text) or not (self._chat or self.completion_only_loss):
            if self.completion_only_loss:
                raise RowError(
                    Reason.UNSUPPORTED, f"completion_only_loss=True, and {self.text_field} has no completion"
                )
            return TextExample(None, text, "text")
        prompt, answer = split_transcript(text, chat=self._chat)
        if isinstance(prompt, str):
            if not isinstance(answer, str):
                raise RowError(Reason.EMPTY_RESPONSE, "the transcript does not end with an Assistant turn")
            return TextExample(prompt, answer, "transcript as text")
        return self._conversation([*prompt, *([answer] if isinstance(answer, dict) else [])], "transcript as chat")

    def _conversation(self, messages: list[Message], how: str) -> ChatExample:
        if not self.completion_only_loss:
            return ChatExample(messages, 0, how)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise RowError(
                Reason.WRONG_ROLE, "completion_only_loss=True, and the last message is not the assistant's answer"
            )
        return ChatExample(messages, len(messages) - 1, f"{how}, last turn")


def _check(example: Example) -> None:
    if isinstance(example, TextExample):
        prompt: list[Any] | None = None if example.prompt is None else [example.prompt]
        rest: list[Any] = [example.text]
    else:
        prompt = example.messages[: example.prompt_length] or None
        rest = example.messages[example.prompt_length :]
    if prompt is not None and all(map(is_empty, prompt)):
        raise RowError(Reason.EMPTY_PROMPT, "nothing comes before the completion")
    if all(map(is_empty, rest)):
        raise RowError(Reason.EMPTY_RESPONSE, "there is no text to learn from" if prompt is None else "completion")
