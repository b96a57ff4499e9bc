"""Data files and rows of any kind: bytes, broken archives, JSON of the wrong shape, halves of characters."""

from __future__ import annotations

import contextlib
import gzip
import json
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from fastalign.data import prepare_completions, prepare_labelled, prepare_lists, prepare_preferences, prepare_prompts
from fastalign.data.files import FILE_SUFFIXES, read_file
from fastalign.data.report import BadRowsError
from fastalign.data.rows import Unreadable

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEYS = ("prompt", "chosen", "rejected", "messages", "completion", "completions", "text", "rank", "ranking", "score")
KEYS += ("label", "tools", "chat_template_kwargs", "image", "margin", "role", "content", "tool_calls", "chat_template")
TEXTS = (
    "",
    " ",
    "\n\nHuman: a",
    "\n\nHuman: a\n\nAssistant: b",
    "\n\nAssistant:",
    "user",
    "assistant",
    "A > B",
    "</s>",
)
TEXTS += ("\ud800", "a\0b", "é", "\ufeff", "[1]", "{", "1" * 5000)

text = st.sampled_from(TEXTS) | st.text(max_size=20) | st.text(st.characters(categories=["Cs", "Cc", "L"]), max_size=6)
scalar = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -(2**63), 1e300, 2**40]) | st.floats() | text
)
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | text, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": text}
) | st.dictionaries(st.sampled_from(("role", "content", "tool_calls")), value)
words = text | st.lists(message, max_size=3) | value
row = st.dictionaries(st.sampled_from(KEYS), words, max_size=6) | value
sensible = st.fixed_dictionaries(
    {"prompt": words},
    optional={
        "chosen": words, "rejected": words, "completion": words, "completions": st.lists(words, max_size=4) | value,
        "rank": st.lists(scalar, max_size=4), "ranking": text, "score": st.lists(scalar, max_size=4), "label": scalar,
        "tools": value, "chat_template_kwargs": st.dictionaries(st.sampled_from(KEYS) | text, value, max_size=2),
        "messages": st.lists(message, max_size=4),
    },
)  # fmt: skip
rows = st.lists(row | sensible, max_size=4)


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@contextlib.contextmanager
def naming(path):
    try:
        yield
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError("the file is not named") from error
        raise


def read_all(path) -> list[Any]:
    source = read_file(path)
    return source.read(source.start, source.stop)


@pytest.mark.parametrize("suffix", FILE_SUFFIXES)
def test_files_of_any_bytes(fuzz, tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    pieces = [
        b'{"a": 1}',
        b"[",
        b"]",
        b"{",
        b"\n",
        b'"',
        b",",
        b"\xff\xfe",
        b"\0",
        b"a,b\n1,2",
        b"\xef\xbb\xbf",
        b"PAR1",
    ]
    pieces += [
        b"1" * 5000,
        b"[" * 100_000,
        b'{"a":1,"a":2}',
        b"NaN",
        b"1e999",
        b'"\\ud800"',
        b"a,a\n1,2",
        b"\r",
        b"\x1f\x8b",
    ]

    def check(parts: list[bytes], packed: bool, lost: int) -> None:
        data = b"".join(parts)
        if packed:
            data = gzip.compress(data)
            data = data[: len(data) - lost] if lost else data
        path.write_bytes(data)
        with naming(path):
            assert isinstance(read_all(path), list)

    fuzz(
        check, st.lists(st.sampled_from(pieces) | st.binary(max_size=30), max_size=6), st.booleans(), st.integers(0, 9)
    )


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz"])
def test_files_with_flipped_bytes(fuzz, tmp_path, suffix):
    table = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b" * 50, "rejected": [1, 2]}] * 20)
    sound, path = tmp_path / f"sound{suffix}", tmp_path / f"data{suffix}"
    table.to_parquet(sound) if suffix == ".parquet" else table.to_json(sound, compression="gzip")
    data = sound.read_bytes()

    def check(flips: list[tuple[int, int]], kept: int) -> None:
        damaged = bytearray(data)
        for at, mask in flips:
            damaged[at % len(damaged)] ^= mask
        path.write_bytes(bytes(damaged)[: len(data) - kept % len(data)])
        read_all(path)

    flip = st.tuples(st.integers(0, len(data)), st.integers(1, 255))
    fuzz(check, st.lists(flip, min_size=1, max_size=4), st.just(0) | st.integers(0, 5000))


@pytest.mark.parametrize(
    "prepare", [prepare_preferences, prepare_completions, prepare_lists, prepare_labelled, prepare_prompts]
)
def test_rows_of_any_kind(fuzz, make_tokenizer, prepare):
    tokenizers = [make_tokenizer(), make_tokenizer(chat_template=TEMPLATE)]

    def check(given: list[Any], template: bool, on_bad_row: str, format: str) -> None:
        data = prepare(given, tokenizers[template], on_bad_row=on_bad_row, format=format, max_length=16)
        assert len(data.dataset) == data.report.kept > 0

    fuzz(check, rows, st.booleans(), st.sampled_from(["error", "skip"]), st.sampled_from(["auto", "chat", "text"]))


def test_rows_that_json_can_spell(fuzz, make_tokenizer, tmp_path):
    path, tokenizer = tmp_path / "data.jsonl", make_tokenizer(chat_template=TEMPLATE)

    def check(given: list[Any]) -> None:
        path.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
        prepare_preferences(str(path), tokenizer, on_bad_row="skip")

    fuzz(check, rows)


def test_numbers_beside_pairs(fuzz, make_tokenizer):
    pair = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    fuzz(lambda margin: prepare_preferences([pair | {"margin": margin}], make_tokenizer(), numbers=["margin"]), value)


@pytest.mark.parametrize(
    "without", [["pad_token"], ["eos_token"], ["bos_token"], ["pad_token", "eos_token", "bos_token"]]
)
@pytest.mark.parametrize("max_length", [1, 2, 3, None])
def test_tokenizers_that_lack_something(fuzz, make_tokenizer, without, max_length):
    tokenizer = make_tokenizer(**dict.fromkeys(without))

    def check(given: list[Any]) -> None:
        prepare_preferences(given, tokenizer, on_bad_row="skip", max_length=max_length)

    fuzz(check, st.lists(st.fixed_dictionaries({"prompt": text, "chosen": text, "rejected": text}), max_size=2))


# What the campaigns found, each with what is said now.
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
            "line 1: an object of the JSON has a key twice",
        ),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1: Exceeds the limit"),
        (b'{"prompt": "a", "chosen": "\\ud83d", "rejected": "d"}', "chosen has a lone surrogate at character 0"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "d", "margin": 1' + b"0" * 400 + b"}",
            "margin is beyond what float32",
        ),
        (b'{"prompt": "a", "chosen": "b", "rejected": "d", "margin": 1e300}', "margin is beyond what float32"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "d", "tools": "' + b"[" * 100_000 + b'"}',
            "tools: JSON nested too deep",
        ),
        (
            b'{"prompt": [], "chosen": "b", "rejected": "d", "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}',
            "chat_template_kwargs may not set chat_template",
        ),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "d", "chat_template_kwargs": {"' + b"k" * 9000 + b'": 1}}',
            "k with plain text",
        ),
    ],
    ids=str,
)
def test_a_bad_row_is_named(make_tokenizer, tmp_path, data, says):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    with pytest.raises(BadRowsError) as refused:
        prepare_preferences(str(path), make_tokenizer(), numbers=["margin"] if b"margin" in data else [])
    assert str(path) in str(refused.value)
    assert "row 0: " in str(refused.value)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.json", b"[" * 100_000, "JSON nested too deep"),
        ("a.json", b"[" + b"1" * 5000 + b"]", "Exceeds the limit"),
        ("a.csv", b"chosen,chosen\n1,2", "has a column twice"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=says) as refused:
        read_all(path)
    assert str(path) in str(refused.value)


def test_text_in_parquet_that_is_no_text(tmp_path):
    """Column files hold bytes; the row whose bytes are not UTF-8 is the one that is bad."""
    values = pyarrow.array([b"good", b"\xff", b"good"], pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(3, *values.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "a.parquet")
    first, second, third = read_all(tmp_path / "a.parquet")
    assert first == third == {"prompt": "good"}
    assert isinstance(second, Unreadable)
