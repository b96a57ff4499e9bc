"""The length limit of encoded pairs."""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.data.encoding import Encoded

TRUNCATION_MODES = ("keep_start", "keep_end")
"""What a sequence over max_length loses: its end (the response's), or its start (the prompt's) as far as needed."""

ON_LONG_PROMPT = ("drop", "truncate")
"""What becomes of a row whose prompt alone fills max_length: it is dropped, or the prompt loses its beginning."""


@dataclass(frozen=True)
class LengthLimit:
    """Makes prompt + completion fit `max_length` tokens (no limit if None); see TRUNCATION_MODES and ON_LONG_PROMPT.

    With the defaults it does what TRL does: the end of the completions is cut, and a row whose prompt leaves no token
    to a completion is dropped. A prompt that is to lose its beginning gives the longer completion all the room it
    needs, but keeps max_length // 2 tokens; a leading BOS token stays. Both completions always share one prompt and
    keep at least one token each. (TRL's "keep_end" cuts each sequence by itself, so that the two prompts differ and a
    completion may lose its beginning.)
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    on_long_prompt: str = "drop"
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 (a prompt and a completion token), got {self.max_length}")
        check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        check_choice("on_long_prompt", self.on_long_prompt, ON_LONG_PROMPT)

    def __call__(self, pair: Encoded) -> Encoded | str:
        """The pair cut to fit (itself if it fits), or why its row is dropped: a key of `DataReport.dropped`."""
        longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
        if self.fits(len(pair.prompt_ids) + longest):
            return pair
        prompt_ids = self.cut_prompt(pair.prompt_ids, longest)
        if prompt_ids is None:
            return "long_prompt"
        room = self.room(prompt_ids)
        cut = Encoded(prompt_ids, pair.chosen_ids[:room], pair.rejected_ids[:room], pair.merged)
        return "identical_after_truncation" if cut.chosen_ids == cut.rejected_ids else cut

    def fits(self, length: int) -> bool:
        return self.max_length is None or length <= self.max_length

    def room(self, prompt_ids: list[int]) -> int | None:
        """How many tokens may follow a prompt; None is any number."""
        return None if self.max_length is None else self.max_length - len(prompt_ids)

    def cut_prompt(self, prompt_ids: list[int], longest: int) -> list[int] | None:
        """The prompt of a row that does not fit, whose longest completion has `longest` tokens; None drops the row."""
        assert self.max_length is not None
        too_long = len(prompt_ids) >= self.max_length
        if too_long and self.on_long_prompt == "drop":
            return None
        if too_long or self.truncation_mode == "keep_end":
            return cut_left(prompt_ids, max(self.max_length - longest, self.max_length // 2), self.bos_token_id)
        return prompt_ids


def cut_left(ids: list[int], length: int, bos_token_id: int | None) -> list[int]:
    """The last `length` ids, a leading BOS token kept."""
    if len(ids) <= length:
        return ids
    if length > 1 and ids[0] == bos_token_id:
        return [ids[0], *ids[1 - length :]]
    return ids[-length:]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; accepted are {', '.join(map(repr, choices))}")
