"""Texts to token ids: a prompt, what follows it, and a boundary that holds at inference.

The prompt's ids are those of the prompt *alone*, because that is what the model is given when it generates. A
completion's ids are what follows the prompt in the ids of prompt + response together. Where tokens merge across the
boundary, the prompt's ids do not begin the joint ids; then the response is encoded apart, and the result must decode to
the same text as the joint ids. (TRL keeps the joint ids and moves the end of the prompt into the completions: the model
is trained on a context it never sees, and on part of the prompt as if it had said it.) The two agree wherever nothing
merges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastalign.data.formats import Pair, TextPair
from fastalign.data.pairs import Message
from fastalign.data.report import Reason, RowError

_ANCHORS = ("\n", ".")  # texts that tokens of a following response rarely merge with


@dataclass(slots=True)
class Rendered:
    """A prompt and responses by name, as text. `plain` text gets BOS and EOS tokens; a template writes its own."""

    prompt: str
    responses: dict[str, str]
    plain: bool


@dataclass(slots=True)
class EncodedResponses:
    """Token ids: `prompt_ids` precede each of `responses`. `merged` responses were encoded apart."""

    prompt_ids: list[int]
    responses: list[list[int]]
    merged: int = 0


@dataclass(slots=True)
class Encoded:
    """Token ids of a pair: `prompt_ids` precede both completions. `merged` completions were encoded apart."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    merged: int = 0


class ResponseEncoder:
    """Encodes prompts, and responses to them, in batches with a transformers tokenizer.

    Plain text: the special tokens that the tokenizer puts before a text (BOS) begin the prompt, once; one
    end-of-sequence token ends each response. Chat: what the template renders, nothing added.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._prefix: list[int] | None = None  # what the tokenizer puts before a text, known from the first one

    def encode(self, items: Sequence[Rendered | RowError]) -> list[EncodedResponses | RowError]:
        """One `EncodedResponses` or the reason why there is none for each item. ValueError: plain text, and no EOS."""
        items = [_encodable(item) for item in items]
        good = [item for item in items if not isinstance(item, RowError)]
        prompts = iter(self.ids([item.prompt for item in good]))
        joint = iter(self.ids([item.prompt + response for item in good for response in item.responses.values()]))
        return [
            item
            if isinstance(item, RowError)
            else self._assemble(item, next(prompts), [next(joint) for _ in item.responses])
            for item in items
        ]

    def encode_prompts(self, items: Sequence[Rendered | RowError]) -> list[list[int] | RowError]:
        """The ids of each item's prompt alone, BOS included, or the reason why there are none."""
        items = [_encodable(item) for item in items]
        good = [item for item in items if not isinstance(item, RowError)]
        ids = iter(self.ids([item.prompt for item in good]))
        return [item if isinstance(item, RowError) else self._prompt(item, next(ids)) for item in items]

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens added."""
        if not texts:
            return []
        # verbose=False: no warning about model_max_length, the length limit is applied afterwards
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def render_chat(
        self, prompt: list[Message], responses: dict[str, list[Message]], template_kwargs: dict[str, Any]
    ) -> Rendered | RowError:
        """A prompt with the header of the answer behind it, and what each response adds to it in the template."""
        apply: Callable[..., str] = self.tokenizer.apply_chat_template
        try:
            text = apply(prompt, add_generation_prompt=True, tokenize=False, **template_kwargs)
            whole = {
                name: apply([*prompt, *messages], tokenize=False, **template_kwargs)
                for name, messages in responses.items()
            }
        except Exception as error:  # a template is a program of its own and may raise anything
            return template_error(error)
        for name, conversation in whole.items():
            if not conversation.startswith(text):
                return RowError(Reason.TEMPLATE_PREFIX, f"{name}: {where_they_part(text, conversation)}")
        return Rendered(text, {name: conversation[len(text) :] for name, conversation in whole.items()}, plain=False)

    def follow(self, prompt_ids: list[int], response: str, joint: list[int]) -> tuple[list[int], bool] | None:
        """(ids of `response` after the prompt, whether it had to be encoded apart); None if no ids give the same text.

        joint: the ids of prompt and response as one text.
        """
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :], False
        apart = self._encode_apart(prompt_ids, response, joint)
        return None if apart is None else (apart, True)

    def with_prefix(self, text: str, ids: list[int]) -> list[int]:
        """The ids of `text` with the special tokens that the tokenizer puts before a text, once."""
        if self._prefix is None:
            # The tokenizer may put special tokens behind a text too; those are not wanted between prompt and response.
            whole, n = self.tokenizer(text)["input_ids"], len(ids)
            self._prefix = next((whole[:i] for i in range(len(whole)) if whole[i : i + n] == ids), None)
        if self._prefix is None:
            raise ValueError("the tokenizer encodes a text differently with and without special tokens around it")
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def with_eos(self, ids: list[int]) -> list[int]:
        """The ids of plain text, closed by one end-of-sequence token. ValueError: the tokenizer has none."""
        if self.eos_token_id is None:
            raise ValueError(
                "plain-text responses end with the end-of-sequence token and the tokenizer has none; "
                "set tokenizer.eos_token"
            )
        return ids if ids[-1] == self.eos_token_id else [*ids, self.eos_token_id]

    def _prompt(self, item: Rendered, prompt_ids: list[int]) -> list[int] | RowError:
        if not prompt_ids:
            return RowError(Reason.EMPTY_PROMPT, "it has no tokens")
        return self.with_prefix(item.prompt, prompt_ids) if item.plain else prompt_ids

    def _assemble(self, item: Rendered, prompt_ids: list[int], joint: list[list[int]]) -> EncodedResponses | RowError:
        responses, merged = [], 0
        whole_prompt = self._prompt(item, prompt_ids)
        if isinstance(whole_prompt, RowError):
            return whole_prompt
        for (name, text), ids in zip(item.responses.items(), joint, strict=True):
            found = self.follow(prompt_ids, text, ids)
            if found is None:
                return RowError(Reason.BOUNDARY, f"{name}: no ids for it alone give the same text after the prompt")
            response, apart = found
            merged += apart
            if not response or (item.plain and response == [self.eos_token_id]):
                return RowError(Reason.EMPTY_RESPONSE, f"{name} has no tokens")
            responses.append(self.with_eos(response) if item.plain else response)
        return EncodedResponses(whole_prompt, responses, merged)

    def _encode_apart(self, prompt_ids: list[int], response: str, joint: list[int]) -> list[int] | None:
        """Ids of `response` that decode to the right text after the prompt; None if none are found.

        Alone, a response may gain what the tokenizer puts before any text (the space of SentencePiece-like tokenizers);
        after a short anchor whose ids are then taken off, it does not.
        """
        candidates = [self.ids([response])[0]]
        for anchor in _ANCHORS:
            head, whole = self.ids([anchor, anchor + response])
            if whole[: len(head)] == head:
                candidates.append(whole[len(head) :])
        text = self._text(joint)
        return next((ids for ids in candidates if self._text(prompt_ids + ids) == text), None)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class PairEncoder(ResponseEncoder):
    """Encodes preference pairs; see `ResponseEncoder`."""

    def __call__(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """One `Encoded` or the reason why there is none for each pair. ValueError: plain text, and no EOS token."""
        return [self._pair(encoded) for encoded in self.encode([self._render(pair) for pair in pairs])]

    def _render(self, pair: Pair) -> Rendered | RowError:
        if isinstance(pair, TextPair):
            return Rendered(pair.prompt, {"chosen": pair.chosen, "rejected": pair.rejected}, plain=True)
        responses = {"chosen": [pair.chosen], "rejected": [pair.rejected]}
        return self.render_chat(pair.prompt, responses, pair.template_kwargs)

    def _pair(self, encoded: EncodedResponses | RowError) -> Encoded | RowError:
        if isinstance(encoded, RowError):
            return encoded
        chosen_ids, rejected_ids = encoded.responses
        if chosen_ids == rejected_ids:
            return RowError(Reason.IDENTICAL, "chosen and rejected have the same tokens")
        return Encoded(encoded.prompt_ids, chosen_ids, rejected_ids, encoded.merged)


def _encodable(item: Rendered | RowError) -> Rendered | RowError:
    if isinstance(item, RowError):
        return item
    return refused_text({"prompt": item.prompt, **item.responses}) or item


def refused_text(texts: dict[str, str]) -> RowError | None:
    """Why the texts, by name, are nothing that a tokenizer takes: JSON can spell half of a character, "\\ud83d"."""
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return RowError(Reason.UNSUPPORTED, f"{name} has a lone surrogate at character {error.start}")
    return None


def template_error(error: Exception) -> RowError:
    return RowError(Reason.TEMPLATE, f"{type(error).__name__}: {str(error)[:200]}")


def where_they_part(prompt: str, whole: str) -> str:
    """Where the rendered conversation `whole` leaves the rendered `prompt`, without quoting either."""
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return f"they part at character {at} of the {len(prompt)} of the rendered prompt"
