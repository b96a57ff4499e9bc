"""Pairs to token ids: one prompt, two completions, and a boundary that holds at inference.

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
from fastalign.data.report import Reason, RowError

_ANCHORS = ("\n", ".")  # texts that tokens of a following response rarely merge with


@dataclass(slots=True)
class Encoded:
    """Token ids of a pair: `prompt_ids` precede both completions. `merged` completions were encoded apart."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    merged: int = 0


class PairEncoder:
    """Encodes pairs in batches with a transformers tokenizer.

    Plain text: the special tokens that the tokenizer puts before a text (BOS) begin the prompt, once; one
    end-of-sequence token ends each completion. Chat: what the template renders, nothing added.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._prefix: list[int] | None = None  # what the tokenizer puts before a text, known from the first one

    def __call__(self, pairs: Sequence[Pair]) -> list[Encoded | RowError]:
        """One `Encoded` or the reason why there is none for each pair. ValueError: plain text, and no EOS token."""
        texts: list[tuple[str, str, str] | RowError] = [self._render(pair) for pair in pairs]
        good = [text for text in texts if not isinstance(text, RowError)]
        prompts, chosen, rejected = zip(*good, strict=True) if good else ((), (), ())
        joint = self._ids(
            [
                *prompts,
                *(prompt + response for prompt, response in zip(prompts, chosen, strict=True)),
                *(prompt + response for prompt, response in zip(prompts, rejected, strict=True)),
            ]
        )
        n = len(good)
        encoded = iter(zip(good, joint[:n], joint[n : 2 * n], joint[2 * n :], strict=True))
        return [
            text if isinstance(text, RowError) else self._assemble(pair, *next(encoded))
            for pair, text in zip(pairs, texts, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: no warning about model_max_length, the length limit is applied afterwards
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _render(self, pair: Pair) -> tuple[str, str, str] | RowError:
        """(prompt, chosen, rejected) as text; a response is what its conversation adds to the rendered prompt."""
        if isinstance(pair, TextPair):
            return pair.prompt, pair.chosen, pair.rejected
        apply: Callable[..., str] = self.tokenizer.apply_chat_template
        kwargs = pair.template_kwargs
        try:
            prompt = apply(pair.prompt, add_generation_prompt=True, tokenize=False, **kwargs)
            conversations = ([*pair.prompt, response] for response in (pair.chosen, pair.rejected))
            whole = [apply(conversation, tokenize=False, **kwargs) for conversation in conversations]
        except Exception as error:  # a template is a program of its own and may raise anything
            return RowError(Reason.TEMPLATE, f"{type(error).__name__}: {str(error)[:200]}")
        for name, text in zip(("chosen", "rejected"), whole, strict=True):
            if not text.startswith(prompt):
                return RowError(Reason.TEMPLATE_PREFIX, f"{name}: {_where_they_part(prompt, text)}")
        return prompt, whole[0][len(prompt) :], whole[1][len(prompt) :]

    def _assemble(
        self, pair: Pair, texts: tuple[str, str, str], prompt_ids: list[int], *joint: list[int]
    ) -> Encoded | RowError:
        if not prompt_ids:
            return RowError(Reason.EMPTY_PROMPT, "it has no tokens")
        completions, merged = [], 0
        for name, response, ids in zip(("chosen", "rejected"), texts[1:], joint, strict=True):
            if ids[: len(prompt_ids)] == prompt_ids:
                completion = ids[len(prompt_ids) :]
            else:
                merged += 1
                apart = self._encode_apart(prompt_ids, response, ids)
                if apart is None:
                    return RowError(Reason.BOUNDARY, f"{name}: no ids for it alone give the same text after the prompt")
                completion = apart
            if not completion or (isinstance(pair, TextPair) and completion == [self.eos_token_id]):
                return RowError(Reason.EMPTY_RESPONSE, f"{name} has no tokens")
            completions.append(completion)
        if isinstance(pair, TextPair):
            if self.eos_token_id is None:
                raise ValueError(
                    "plain-text responses end with the end-of-sequence token and the tokenizer has none; "
                    "set tokenizer.eos_token"
                )
            completions = [ids if ids[-1] == self.eos_token_id else [*ids, self.eos_token_id] for ids in completions]
            prompt_ids = self._with_prefix(texts[0], prompt_ids)
        chosen_ids, rejected_ids = completions
        if chosen_ids == rejected_ids:
            return RowError(Reason.IDENTICAL, "chosen and rejected have the same tokens")
        return Encoded(prompt_ids, chosen_ids, rejected_ids, merged)

    def _with_prefix(self, prompt: str, prompt_ids: list[int]) -> list[int]:
        if self._prefix is None:
            # The tokenizer may put special tokens behind a text too; those are not wanted between prompt and response.
            whole, n = self.tokenizer(prompt)["input_ids"], len(prompt_ids)
            self._prefix = next((whole[:i] for i in range(len(whole)) if whole[i : i + n] == prompt_ids), None)
        if self._prefix is None:
            raise ValueError("the tokenizer encodes a text differently with and without special tokens around it")
        return prompt_ids if prompt_ids[: len(self._prefix)] == self._prefix else self._prefix + prompt_ids

    def _encode_apart(self, prompt_ids: list[int], response: str, joint: list[int]) -> list[int] | None:
        """Ids of `response` that decode to the right text after the prompt; None if none are found.

        Alone, a response may gain what the tokenizer puts before any text (the space of SentencePiece-like tokenizers);
        after a short anchor whose ids are then taken off, it does not.
        """
        candidates = [self._ids([response])[0]]
        for anchor in _ANCHORS:
            head, whole = self._ids([anchor, anchor + response])
            if whole[: len(head)] == head:
                candidates.append(whole[len(head) :])
        text = self._text(joint)
        return next((ids for ids in candidates if self._text(prompt_ids + ids) == text), None)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _where_they_part(prompt: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return f"they part at character {at} of the {len(prompt)} of the rendered prompt"
