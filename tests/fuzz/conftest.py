"""How much is tried, and what every target has to do with input of any kind: take it, or refuse it in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QUICK, LONG = 10, 2000
SPECIAL = ["<s>", "</s>", "<pad>"]

Fuzz = Callable[..., None]


def refusal_of(check: Callable[..., Any], *values: Any) -> ValueError | None:
    """The ValueError that `check` refused its input with. Python's own UnicodeError names neither file nor row."""
    try:
        check(*values)
    except UnicodeError as error:
        raise AssertionError("not a message for a user") from error
    except ValueError as error:
        return error
    return None


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A command says how much is logged from then on; tests that run after these count on silence."""
    logger = logging.getLogger("fastalign")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def refusal() -> Callable[..., ValueError | None]:
    return refusal_of


@pytest.fixture(params=["quick", pytest.param("long", marks=pytest.mark.long)])
def fuzz(request: pytest.FixtureRequest) -> Iterator[Fuzz]:
    """fuzz(check, *strategies): nothing but a ValueError that says something may come out of `check`."""
    quick = request.param == "quick"
    refused = 0

    def run(check: Callable[..., Any], *strategies: Any) -> None:
        @settings(
            max_examples=QUICK if quick else LONG, derandomize=quick, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.tuples(*strategies))
        def target(values: tuple[Any, ...]) -> None:
            nonlocal refused
            if (error := refusal_of(check, *values)) is not None:
                assert 0 < len(str(error).strip()) < 10_000
                refused += 1

        target()

    yield run
    request.node.user_properties.append(("bad inputs refused", refused))  # for the tally of tests/faults


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make(**kwargs): a tokenizer of bytes with <s>, </s> and <pad>; kwargs take them away or add a chat template."""

    def make(**kwargs: Any) -> PreTrainedTokenizerFast:
        names = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        kwargs = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **kwargs}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)

    return make
