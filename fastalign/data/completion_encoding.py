"""Examples to token ids and a mask of those that are trained on.

A text is a row of segments, some trained on, some not: prompt and completion, or the turns of a conversation. Each
segment's ids are what it adds to the ids before it, by the rules of `ResponseEncoder`: what the model is trained to
say follows the very ids it is given when it says it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastalign.data.encoding import ResponseEncoder, refused_text, template_error, where_they_part
from fastalign.data.examples import ChatExample, Example, TextExample
from fastalign.data.report import Reason, RowError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the tag by which a template marks what the assistant says


@dataclass(slots=True)
class EncodedExample:
    """input_ids, and for each whether it is trained on; the first `prompt_length` of them come before all of those.

    `merged` counts segments that were encoded apart; `closed`: the end-of-sequence token is trained on.
    """

    input_ids: list[int]
    mask: list[bool]
    prompt_length: int
    merged: int = 0
    closed: bool = True


@dataclass(slots=True)
class _Segments:
    parts: list[tuple[str, bool]]  # text, trained on
    plain: bool


class CompletionEncoder(ResponseEncoder):
    """Encodes examples in batches.

    completion_only_loss    None: of an example with a prompt the rest is trained on, of one without all of it; False:
                            all of it always
    assistant_only_loss     train on what the assistant says alone: on what the chat template marks by
                            {% generation %}; in a template without that tag, on what each assistant message adds to
                            the conversation before it, generation prompt included, which must not change what was
                            rendered before. Both options together: what the assistant says after the prompt
    """

    def __init__(self, tokenizer: Any, *, completion_only_loss: bool | None = None, assistant_only_loss: bool = False):
        super().__init__(tokenizer)
        self.completion_only = completion_only_loss is not False
        self.assistant_only = assistant_only_loss

    def __call__(self, examples: Sequence[Example]) -> list[EncodedExample | RowError]:
        """One `EncodedExample` or the reason why there is none for each. ValueError: plain text, and no EOS token."""
        rendered = [self._checked(self._render(example)) for example in examples]
        texts = [
            "".join(text for text, _ in item.parts[: n + 1])
            for item in rendered
            if isinstance(item, _Segments)
            for n in range(len(item.parts))
        ]
        ids = iter(self.ids(texts))
        return [
            self._join(item, [next(ids) for _ in item.parts]) if isinstance(item, _Segments) else item
            for item in rendered
        ]

    # ---- rendering

    def _checked(self, item: _Segments | EncodedExample | RowError) -> _Segments | EncodedExample | RowError:
        if not isinstance(item, _Segments):
            return item
        return refused_text({"its text": "".join(text for text, _ in item.parts)}) or item

    def _render(self, example: Example) -> _Segments | EncodedExample | RowError:
        if isinstance(example, TextExample):
            if self.assistant_only:
                return RowError(Reason.UNSUPPORTED, "assistant_only_loss=True needs messages, and this is plain text")
            if example.prompt is None:
                return _Segments([(example.text, True)], plain=True)
            return _Segments([(example.prompt, not self.completion_only), (example.text, True)], plain=True)
        try:
            if not self.assistant_only:
                return self._render_conversation(example)
            template = self.tokenizer.get_chat_template(tools=example.template_kwargs.get("tools"))
            if _GENERATION.search(template):
                return self._marked_by_template(example)
            return self._render_turns(example)
        except RowError as error:
            return error
        except Exception as error:  # a template is a program of its own and may raise anything
            return template_error(error)

    def _apply(self, example: ChatExample, length: int | None = None, **kwargs: Any) -> str:
        apply: Callable[..., str] = self.tokenizer.apply_chat_template
        return apply(example.messages[:length], tokenize=False, **kwargs, **example.template_kwargs)

    def _render_conversation(self, example: ChatExample) -> _Segments:
        whole = self._apply(example)
        if not example.prompt_length:
            return _Segments([(whole, True)], plain=False)
        prompt = self._prefix_of(whole, example, example.prompt_length, "completion")
        return _Segments([(prompt, not self.completion_only), (whole[len(prompt) :], True)], plain=False)

    def _render_turns(self, example: ChatExample) -> _Segments:
        """Segments that alternate between what the assistant is given and what it says."""
        whole = self._apply(example)
        first = example.prompt_length if self.completion_only else 0
        cuts: list[tuple[int, bool]] = []  # (end of a segment, trained on)
        for index, message in enumerate(example.messages):
            if index < first or message["role"] != "assistant":
                continue
            if index == 0:  # no template says what its header would be
                raise RowError(Reason.WRONG_ROLE, "messages[0] is the assistant's: nothing comes before it")
            given = self._prefix_of(whole, example, index, f"messages[{index}]")
            said = self._apply(example, index + 1)
            if not whole.startswith(said) or len(said) <= len(given):
                raise self._unstable(f"messages[{index}]", said, whole)
            cuts += [(len(given), False), (len(said), True)]
        if not cuts:
            raise RowError(Reason.WRONG_ROLE, "assistant_only_loss=True, and there is no assistant message")
        cuts.append((len(whole), False))
        starts = [0, *(end for end, _ in cuts)]
        parts = [(whole[start:end], trained) for start, (end, trained) in zip(starts, cuts, strict=False)]
        return _Segments([(text, trained) for text, trained in parts if text], plain=False)

    def _prefix_of(self, whole: str, example: ChatExample, length: int, name: str) -> str:
        """The first messages with the header of the answer, which must begin the whole conversation."""
        given = self._apply(example, length, add_generation_prompt=True)
        if not whole.startswith(given):
            raise self._unstable(name, given, whole)
        return given

    def _unstable(self, name: str, part: str, whole: str) -> RowError:
        detail = f"{name}: {where_they_part(part, whole)}"
        if self.assistant_only:
            detail += "; a template that marks the assistant's words by {% generation %} has no such need"
        return RowError(Reason.TEMPLATE_PREFIX, detail)

    def _marked_by_template(self, example: ChatExample) -> EncodedExample:
        encoded = self.tokenizer.apply_chat_template(
            example.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            **example.template_kwargs,
        )  # fmt: skip
        ids, mask = encoded["input_ids"], [bool(marked) for marked in encoded["assistant_masks"]]
        if example.prompt_length and self.completion_only:
            prompt = self._prefix_of(self._apply(example), example, example.prompt_length, "completion")
            (prompt_ids,) = self.ids([prompt])
            if ids[: len(prompt_ids)] != prompt_ids:
                raise RowError(Reason.BOUNDARY, "completion: tokens merge across the prompt's end")
            mask[: len(prompt_ids)] = [False] * len(prompt_ids)
        if not any(mask):
            raise RowError(Reason.WRONG_ROLE, "assistant_only_loss=True, and the template marks nothing as said by it")
        closed = any(trained and token == self.eos_token_id for token, trained in zip(ids, mask, strict=True))
        return EncodedExample(ids, mask, mask.index(True), closed=closed)

    # ---- ids

    def _join(self, item: _Segments, joint: list[list[int]]) -> EncodedExample | RowError:
        """Ids of the segments one after the other. joint: those of the text up to the end of each."""
        ids: list[int] = joint[0]
        if not ids:
            empty = Reason.EMPTY_RESPONSE if len(joint) == 1 else Reason.EMPTY_PROMPT
            return RowError(empty, "it has no tokens")
        ends, merged = [len(ids)], 0
        for (text, _), so_far in zip(item.parts[1:], joint[1:], strict=True):
            found = self.follow(ids, text, so_far)
            if found is None:
                return RowError(Reason.BOUNDARY, "no ids for what follows the prompt alone give the same text after it")
            added, apart = found
            if not added or (item.plain and added == [self.eos_token_id]):
                return RowError(Reason.EMPTY_RESPONSE, "completion has no tokens")
            ids, merged = ids + added, merged + apart
            ends.append(len(ids))
        trained = [flag for _, flag in item.parts]
        mask = [flag for flag, length in zip(trained, _lengths(ends), strict=True) for _ in range(length)]
        if item.plain:
            first = self.with_prefix(item.parts[0][0], joint[0])
            prefix, closed = first[: len(first) - len(joint[0])], self.with_eos(ids)
            mask = [trained[0]] * len(prefix) + mask + [True] * (len(closed) - len(ids))
            ids = prefix + closed
        prompt_length = 0 if trained[0] else mask.index(True)
        has_eos = any(flag and token == self.eos_token_id for token, flag in zip(ids, mask, strict=True))
        return EncodedExample(ids, mask, prompt_length, merged, has_eos)


def _lengths(ends: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
