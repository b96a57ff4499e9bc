"""Ids that a model has no embedding for are found before it is called, in every kind of column."""

from __future__ import annotations

import pytest
from datasets import Dataset, concatenate_datasets

from fastalign.trainers.vocabulary import check_token_ids

COLUMNS = {"prompt_ids": [3, 4], "chosen_ids": [5], "response_ids": [[6, 7], [8]], "input_ids": [9]}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("token", [61, 2**31 - 1, -1])
def test_the_row_and_the_token_are_named(kit, column, token):
    model = kit.model()
    sound = [COLUMNS | {"row": 10 + n} for n in range(3)]
    check_token_ids(model, kit.tokenizer, None, Dataset.from_list(sound))
    value = [[3], [4, token]] if column == "response_ids" else [3, token, 4]
    bad = Dataset.from_list([COLUMNS | {column: value, "row": 99}])
    chunks = concatenate_datasets([Dataset.from_list(sound), bad])
    with pytest.raises(ValueError, match=rf"{column} of row 99 has token {token}, .* embeddings for 61 tokens"):
        check_token_ids(model, kit.tokenizer, chunks)
    check_token_ids(model, kit.tokenizer, chunks.select(range(3)))


def test_padding_is_a_token_too(kit):
    with pytest.raises(ValueError, match="the padding is token 0, and LlamaForCausalLM has embeddings for 0 tokens"):
        check_token_ids(kit.model(vocab_size=0, pad_token_id=None), kit.tokenizer)


def test_a_run_does_not_begin(kit):
    data = Dataset.from_list([{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5, 99], "row": 7}])
    with pytest.raises(ValueError, match="rejected_ids of row 7 has token 99"):
        kit.trainer(kit.model(), data)
