"""Whole commands on awkward models, tokenizers and data: a trained model, or status 2 and one line that says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from fastalign.cli import main

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
TALK = [{"role": "user", "content": "1 + 1?"}]


def pair(n: int, **own: Any) -> dict[str, Any]:
    return {"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n} or so"} | own


def completion(n: int, **own: Any) -> dict[str, Any]:
    return {"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} | own


def ranked(n: int, **own: Any) -> dict[str, Any]:
    return {"prompt": f"{n} + 1 =", "completions": [f" {n + 1}", f" {n} or so"], "rank": [1, 2]} | own


# What each command learns from, its flags, and the columns that hold responses.
RUNS: dict[str, tuple[Any, list[str], tuple[str, ...]]] = {
    "sft": (completion, [], ("completion",)),
    "reward": (pair, [], ("chosen", "rejected")),
    "dpo": (pair, [], ("chosen", "rejected")),
    "dpo --loss_type kto": (pair, [], ("chosen", "rejected")),
    "dpo --loss_type simpo": (pair, [], ("chosen", "rejected")),
    "pro": (ranked, [], ("completions",)),
    "ppo": (completion, ["--reward_funcs", "fuzz_rewards:digits", "--response_length", "4"], ()),
}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, make_tokenizer):
    """make(model=None, **kwargs of the tokenizer): the folder of a tiny model and its tokenizer."""
    made: dict[str, Path] = {}

    def make(model: Any = None, *, vocabulary: int | None = None, **kwargs: Any) -> str:
        name = repr((model, vocabulary, sorted(kwargs.items())))
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp("checkpoint")
            tokenizer = make_tokenizer(**kwargs)
            tokenizer.save_pretrained(folder)
            torch.manual_seed(0)
            (model or llama)(vocabulary or len(tokenizer)).save_pretrained(folder)
        return str(made[name])

    return make


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}


def llama(vocabulary: int, **own: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=vocabulary, **(SIZES | IDS | own)))


@pytest.fixture
def run(make_checkpoint, tmp_path, monkeypatch, capsys):
    """run(command, rows, *flags, checkpoint=) -> (status, what was printed); one line on stderr where it is not 0."""
    (tmp_path / "fuzz_rewards.py").write_text(
        "def digits(completions, **columns):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = tmp_path / "data.jsonl"

    def call(command: str, rows: Any, *flags: str, checkpoint: str | None = None) -> tuple[int, str]:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        data.write_text(text, encoding="utf-8")
        name, *own = command.split()
        given = {
            "model_name_or_path": checkpoint or make_checkpoint(), "dataset_name": data, "output_dir": tmp_path / "out",
            "max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no",
            "eval_strategy": "no", "max_length": 32,
        }  # fmt: skip
        given |= {"cache_dir": tmp_path / "cache"} if name == "dpo" else {}
        words = [word for key, value in given.items() if f"--{key}" not in flags for word in (f"--{key}", str(value))]
        capsys.readouterr()
        status = main([name, *own, *words, *RUNS[command][1], *flags, "--use_cpu", "--disable_tqdm"])
        out, err = capsys.readouterr()
        assert status in (0, 1, 2)
        assert "Traceback" not in err
        if status:
            assert err.splitlines()[-1].startswith((f"fastalign {name}: ", "  row ", "  and ", "Mend these")), err
        return status, err if status else out

    return call


def refused(result: tuple[int, str], *says: str) -> None:
    status, err = result
    assert status == 2, result
    for text in says:
        assert text in err


QUICK, EVERY = ("sft", "dpo"), tuple(RUNS)
commands = pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in EVERY]
)
every_command = pytest.mark.parametrize("command", EVERY)


@commands
def test_a_data_set_without_rows(run, command):
    refused(run(command, ""), "data.jsonl has no rows")


@commands
def test_one_row(run, command):
    result = run(command, [RUNS[command][0](1)])
    if command == "dpo --loss_type kto":
        refused(result, "one prompt")
    else:
        assert result[0] == 0, result


@commands
def test_a_key_twice(run, command):
    row = json.dumps(RUNS[command][0](1))
    refused(run(command, row[:-1] + ', "prompt": "again"}\n'), "row 0: ", "key twice")


@commands
def test_a_response_without_tokens(run, command):
    make, _, responses = RUNS[command]
    for name in responses:
        for empty in ("", " \n"):
            value = [" 2", empty] if name == "completions" else empty
            refused(run(command, [make(0), make(1, **{name: value})]), "row 1: empty response")


def long_prompts(command: str) -> list[Any]:
    return [RUNS[command][0](n, prompt=f"{n} + 1 = " * 40) for n in range(2)]


@commands
def test_prompts_longer_than_max_length(run, command):
    refused(run(command, long_prompts(command)), "no row is left to train on", "2 long_prompt")


@pytest.mark.long
@every_command
def test_prompts_that_are_cut(run, command):
    status, text = run(command, long_prompts(command), "--on_long_prompt", "truncate")
    assert status == 0, text


@commands
def test_a_folder_that_is_not_there(run, command, tmp_path):
    missing = str(tmp_path / "no" / "such")
    refused(
        run(command, [RUNS[command][0](0)], "--model_name_or_path", missing), "model_name_or_path", f"{missing!r}",
        "no such folder",
    )  # fmt: skip


@commands
def test_a_folder_without_a_model(run, command, tmp_path):
    refused(run(command, [RUNS[command][0](0)], "--model_name_or_path", str(tmp_path)), str(tmp_path), "config.json")


@pytest.mark.long
@every_command
@pytest.mark.parametrize(
    "without", [("pad_token",), ("eos_token",), ("pad_token", "eos_token"), ("pad_token", "eos_token", "bos_token")]
)
def test_tokenizers_that_lack_something(run, make_checkpoint, command, without):
    checkpoint = make_checkpoint(**dict.fromkeys(without))
    result = run(command, [RUNS[command][0](n) for n in range(4)], checkpoint=checkpoint)
    if "eos_token" in without and command != "ppo":  # whose completions then never end by themselves
        refused(result, "end-of-sequence token")
    else:
        assert result[0] == 0, result


@commands
def test_messages_without_a_chat_template(run, command):
    make = RUNS[command][0]
    rows = [make(n, prompt=TALK) for n in range(4)]
    refused(run(command, rows), "row 0: unsupported content (messages need a chat template")


@pytest.mark.long
@every_command
def test_messages_with_one(run, make_checkpoint, command):
    make = RUNS[command][0]
    talks = [[{"role": "user", "content": f"{n} + 1?"}] for n in range(4)]
    status, text = run(
        command, [make(n, prompt=talk) for n, talk in enumerate(talks)],
        checkpoint=make_checkpoint(chat_template=TEMPLATE, pad_token=None),
    )  # fmt: skip
    assert status == 0, text


@pytest.mark.long
@every_command
def test_tokens_that_the_model_does_not_have(run, make_checkpoint, command):
    """A tokenizer that is larger than the model: an id without an embedding would be read past its end on a GPU."""
    small = make_checkpoint(vocabulary=40)
    refused(run(command, [RUNS[command][0](n) for n in range(4)], checkpoint=small), "40", "token")


# ---- models


def gpt2(vocabulary: int) -> Any:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, **IDS))


def phi(vocabulary: int) -> Any:
    return tf.PhiForCausalLM(tf.PhiConfig(vocab_size=vocabulary, **(SIZES | IDS)))


def tied(vocabulary: int) -> Any:
    return llama(vocabulary, tie_word_embeddings=True)


def bert(vocabulary: int) -> Any:
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=vocabulary, **SIZES))


def encoder(vocabulary: int) -> Any:
    return tf.BertModel(tf.BertConfig(vocab_size=vocabulary, **SIZES))


def headless(vocabulary: int) -> Any:
    return tf.LlamaModel(tf.LlamaConfig(vocab_size=vocabulary, **(SIZES | IDS)))


def seq2seq(vocabulary: int) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **sizes))


@pytest.mark.long
@every_command
@pytest.mark.parametrize("model", [gpt2, phi, tied], ids=lambda make: make.__name__)
def test_heads_of_other_kinds(run, make_checkpoint, command, model):
    """Tied to the embeddings, in a Conv1D family, with a bias."""
    status, text = run(command, [RUNS[command][0](n) for n in range(4)], checkpoint=make_checkpoint(model))
    assert status == 0, text


@pytest.mark.long
@every_command
@pytest.mark.parametrize("model", [bert, encoder, headless, seq2seq], ids=lambda make: make.__name__)
def test_models_that_are_none(run, make_checkpoint, command, model):
    """Encoders, a backbone whose head would be random, an encoder-decoder."""
    result = run(command, [RUNS[command][0](n) for n in range(4)], checkpoint=make_checkpoint(model))
    if command == "reward" and model is headless:  # its head is a new one in any case
        assert result[0] == 0, result
    else:
        refused(result)
        assert len(result[1].splitlines()[-1]) < 600


# ---- numbers


@pytest.mark.long
@every_command
@pytest.mark.parametrize("where", ["embedding", "head"])
def test_weights_that_are_not_numbers(run, make_checkpoint, tmp_path, command, where):
    """The run stops before the optimizer has seen a step of them, and says which rows it was at."""
    folder = tmp_path / "poisoned"
    shutil.copytree(make_checkpoint(), folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight if where == "embedding" else model.lm_head.weight
        weight[:] = torch.nan if where == "embedding" else torch.inf
    model.save_pretrained(folder)
    status, text = run(command, [RUNS[command][0](n) for n in range(4)], checkpoint=str(folder))
    if command == "reward" and where == "head":  # which it does not have
        assert status == 0
    else:
        assert status in (1, 2)
        assert any(word in text for word in ("nan", "inf", "finite")), text


@pytest.mark.long
@every_command
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_makes_numbers_no_numbers_is_named(run, make_checkpoint, make_tokenizer, tmp_path, command, value):
    """One token's embedding is spoilt, which one row has; a model that is sound on all others."""
    folder = tmp_path / "poisoned"
    shutil.copytree(make_checkpoint(), folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    (token,) = make_tokenizer()("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    model.save_pretrained(folder)
    make = RUNS[command][0]
    rows = [make(n, prompt=f"{n} + {'Z' if n == 2 else 1} =") for n in range(6)]
    status, text = run(command, rows, "--max_steps", "6", "--per_device_train_batch_size", "1", checkpoint=str(folder))
    assert status == 1 or "dpo" in command, text
    assert status in (1, 2)
    assert any(word in text for word in ("row 2", "rows 2")), text


@pytest.mark.parametrize("command", ["plan --tokens 8", "doctor", "cache build", "bench step --tokens 8"])
def test_a_missing_folder_is_said_by_every_command(tmp_path, capsys, command):
    missing = str(tmp_path / "no" / "such")
    flags = ["--model_name_or_path", missing, "--use_cpu"]
    flags += ["--dataset_name", missing + ".jsonl", "--cache_dir", str(tmp_path)] if command == "cache build" else []
    assert main([*command.split(), *flags]) == 2
    assert f"{missing!r}: there is no such folder" in capsys.readouterr().err.splitlines()[-1]
