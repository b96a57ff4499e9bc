"""From a config to examples: what is trained on, formatting functions, chat templates, end-of-sequence tokens."""

import copy

import pytest
from datasets import Dataset

from fastalign.trainers import SFTConfig
from fastalign.trainers.sft_data import completion_examples, packed, prepare_tokenizer

ROWS = [{"prompt": "w3 w4", "completion": " w5"}, {"prompt": "w6", "completion": " w7 w8"}]
CHAT = [{"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]}]


@pytest.fixture
def config(tmp_path):
    return lambda **settings: SFTConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("rows", "settings", "trained"),
    [
        (ROWS, {}, [["w5", "<eos>"], ["w7", "w8", "<eos>"]]),
        (ROWS, {"completion_only_loss": False}, [["w4", "w5", "<eos>"], ["w7", "w8", "<eos>"]]),
        ([{"text": "w3 w4"}], {}, [["w4", "<eos>"]]),
        ([{"body": "w3 w4"}], {"dataset_text_field": "body"}, [["w4", "<eos>"]]),
        (CHAT, {}, [["<eos>", "w4", "<eos>"]]),
        (CHAT, {"assistant_only_loss": True}, [["w4", "<eos>"]]),
        (CHAT, {"completion_only_loss": True}, [["w4", "<eos>"]]),
        ([{"text": "w3 w4 w5 w6"}], {"max_length": 3}, [["w4", "w5"]]),
    ],
)
def test_what_is_trained_on_follows_the_config(tokenizer, config, rows, settings, trained):
    examples = completion_examples(tokenizer, config(**settings))
    found = [
        [token for token, on in zip(tokenizer.convert_ids_to_tokens(e["input_ids"]), e["completion_mask"], strict=True)
         if on]
        for e in examples.prepare(rows, "train")
    ]  # fmt: skip
    assert found == trained
    assert examples.reports["train"].kept == len(rows)


def test_a_formatting_function_makes_the_text(tokenizer, config):
    def text(row):
        return f"{row['a']} {row['b']}"

    examples = completion_examples(tokenizer, config(max_samples=2), text)
    prepared = examples.prepare([{"a": "w3", "b": "w4"}] * 3, "train")
    assert [tokenizer.decode(ids) for ids in prepared["input_ids"]] == ["w3 w4 <eos>"] * 2
    for settings in ({"completion_only_loss": True}, {"assistant_only_loss": True}):
        with pytest.raises(ValueError, match="formatting_func makes plain text"):
            completion_examples(tokenizer, config(**settings), text)


def test_bad_rows_are_named(tokenizer, config):
    rows = [{"text": "w3 w4"}, {"label": 1}]
    with pytest.raises(ValueError, match=r"row 1: missing key \(none of 'text', 'messages'"):
        completion_examples(tokenizer, config()).prepare(rows, "train")
    assert len(completion_examples(tokenizer, config(on_bad_row="skip")).prepare(rows, "train")) == 1


def test_tokenised_data_is_checked(tokenizer, config):
    rows = Dataset.from_list([{"input_ids": [3] * 9, "completion_mask": [False, True] + [True] * 7, "row": 0}])
    assert completion_examples(tokenizer, config()).prepare(rows, "train") is rows
    with pytest.raises(ValueError, match="row 0 of the tokenised data set has 9 tokens, max_length=4 is accepted"):
        completion_examples(tokenizer, config(max_length=4)).prepare(rows, "train")
    split = config(max_length=4, packing=True, packing_strategy="bfd_split")
    pieces = packed(completion_examples(tokenizer, split).prepare(rows, "train"), "train", split)
    assert sorted(n for e in pieces for n in e["seq_lengths"]) == [4, 4]  # the ninth token has none before it


def test_a_packed_set_stays_as_it_is(tokenizer, config):
    args = config(max_length=8)
    once = packed(completion_examples(tokenizer, args).prepare(ROWS, "train"), "train", args)
    assert once["seq_lengths"][0] == [4, 4]
    assert packed(once, "train", args) is once


# The tokenizer --------------------------------------------------------------------------------------------------------


def test_the_template_and_the_end_of_sequence_can_be_chosen(tokenizer, config, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}")
    own = copy.deepcopy(tokenizer)
    args = config(chat_template_path=str(path), eos_token="w60")
    prepare_tokenizer(own, args)
    examples = completion_examples(own, args)
    chat = examples.prepare([{"messages": [{"role": "user", "content": "w3"}]}], "train")["input_ids"][0]
    assert own.convert_ids_to_tokens(chat) == ["<unk>", "w3", "<eos>"]
    assert examples.prepare([{"text": "w3"}], "train")["input_ids"][0] == [3, 60]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": "<nothing>"}, "eos_token='<nothing>': it is not in the vocabulary"),
        ({"chat_template_path": "nowhere.jinja"}, "chat_template_path='nowhere.jinja': there is no such file"),
    ],
)
def test_what_a_tokenizer_cannot_be_given_is_named(tokenizer, config, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare_tokenizer(copy.deepcopy(tokenizer), config(**settings))


def test_another_tokenizers_template_is_taken_with_its_special_tokens_or_not_at_all(tokenizer, config, tmp_path):
    own, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    other.chat_template = "<|turn|> {% for m in messages %}{{ m['content'] }}{% endfor %}"
    other.save_pretrained(tmp_path / "plain")
    prepare_tokenizer(own, config(chat_template_path=str(tmp_path / "plain")))
    assert own.chat_template == other.chat_template
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.save_pretrained(tmp_path / "special")
    with pytest.raises(ValueError, match=r"its template writes <\|turn\|>, which this tokenizer does not have"):
        prepare_tokenizer(own, config(chat_template_path=str(tmp_path / "special")))
    other.chat_template = None
    other.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="that tokenizer has no chat template"):
        prepare_tokenizer(own, config(chat_template_path=str(tmp_path / "bare")))
