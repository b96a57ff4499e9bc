"""A pad token that ends no sequence: plain transformers then gives our scores to anything the tokenizer pads."""

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastalign.models import load_scalar_model, score_sequences, separate_pad_token

WORDS = {f"w{i}": i for i in range(5, 50)}
TEXTS = ["w5 w6 w7 w8 w9 <eos>", "w10 <eos>", "w11 w12", "w13 w14 w15 <eos> <eos>", "w16"]


def word_tokenizer(special: dict[int, str], **named):
    """One token a word; `special` tokens by id, below 5."""
    vocabulary = {special.get(i, f"x{i}"): i for i in range(5)} | WORDS
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=named.get("unk_token", "x0")))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    return tokenizer


def byte_tokenizer(**named):
    """Every text has tokens of its own: the unknown token is never given."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<unk>": 256, "<eos>": 257}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def make(vocab_size: int = 50, **config):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": None,
        "pad_token_id": None, "num_labels": 1,
    }  # fmt: skip
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**(sizes | config))).eval()


def assert_plain_transformers_agrees(model, tokenizer, folder):
    """Saved, loaded by plain transformers, padded by its tokenizer on either side: the scores are ours."""
    ours = score_sequences(model, [(tokenizer(text)["input_ids"], 1) for text in TEXTS])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = tf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded = tf.AutoTokenizer.from_pretrained(folder)
    assert loaded.padding_side == "right"
    for side in ("right", "left"):
        loaded.padding_side = side
        with torch.no_grad():
            theirs = plain(**loaded(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)).logits
        np.testing.assert_allclose(theirs.squeeze(-1).numpy(), ours, rtol=1e-4, atol=1e-5)
    assert len(set(np.round(ours, 5))) == len(TEXTS)


def test_pad_that_is_eos_gives_way_to_a_token_named_pad(tmp_path):
    special = {0: "<unk>", 1: "<eos>", 2: "<|reserved_special_token_0|>", 3: "<|finetune_right_pad_id|>"}
    tokenizer = word_tokenizer(special, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    model = make(pad_token_id=1)
    assert separate_pad_token(model, tokenizer) == 3
    assert model.config.pad_token_id == tokenizer.pad_token_id == 3
    assert len(tokenizer) == 50
    assert_plain_transformers_agrees(model, tokenizer, tmp_path)


def test_without_this_the_trap_is_real(tmp_path):
    special = {0: "<unk>", 1: "<eos>"}
    tokenizer = word_tokenizer(special, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    with pytest.raises(AssertionError):
        assert_plain_transformers_agrees(make(pad_token_id=1), tokenizer, tmp_path)


def test_a_good_pad_token_stays(tmp_path):
    special = {0: "<unk>", 1: "<eos>", 2: "<pad>"}
    tokenizer = word_tokenizer(special, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left")
    model = make(pad_token_id=1)
    assert separate_pad_token(model, tokenizer) == separate_pad_token(model, tokenizer) == 2
    assert tokenizer.pad_token == "<pad>"
    assert model.config.pad_token_id == 2
    assert_plain_transformers_agrees(model, tokenizer, tmp_path)


def test_a_token_that_begins_sequences_may_pad():
    tokenizer = word_tokenizer(
        {0: "<unk>", 1: "<eos>", 2: "<s>"}, eos_token="<eos>", pad_token="<s>", unk_token="<unk>"
    )
    assert separate_pad_token(make(bos_token_id=2), tokenizer) == 2


def test_an_end_token_of_the_model_alone_is_no_pad_either():
    special = {0: "<unk>", 1: "<eos>", 2: "<end>", 3: "<|reserved|>"}
    tokenizer = word_tokenizer(special, eos_token="<eos>", pad_token="<end>", unk_token="<unk>")
    assert separate_pad_token(make(eos_token_id=[1, 2]), tokenizer) == 3


def test_unknown_token_only_where_text_never_gives_it(tmp_path):
    tokenizer = byte_tokenizer(eos_token="<eos>", unk_token="<unk>")
    model = make(258, eos_token_id=257)
    assert separate_pad_token(model, tokenizer) == 256
    assert_plain_transformers_agrees(model, tokenizer, tmp_path)
    words = word_tokenizer({0: "<unk>", 1: "<eos>"}, eos_token="<eos>", unk_token="<unk>")
    assert separate_pad_token(make(), words) not in (0, 1)


def test_added_token_with_and_without_spare_rows(tmp_path):
    for rows, expected_rows in ((50, 51), (64, 64)):
        tokenizer = word_tokenizer({0: "<unk>", 1: "<eos>"}, eos_token="<eos>", unk_token="<unk>")
        model = make(rows)
        assert separate_pad_token(model, tokenizer) == 50
        assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == expected_rows
        assert_plain_transformers_agrees(model, tokenizer, tmp_path / str(rows))
    tokenizer = word_tokenizer({0: "<unk>", 1: "<pad>"}, eos_token="<pad>", unk_token="<unk>")
    separate_pad_token(make(64), tokenizer)
    assert tokenizer.pad_token == "<<pad>>"


def test_under_an_adapter_no_row_can_be_added(tmp_path):
    make().save_pretrained(tmp_path / "m")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    for special, named, outcome in (({3: "<|pad|>"}, {}, 3), ({}, {}, None)):
        peft = get_peft_model(load_scalar_model(tmp_path / "m"), config)
        tokenizer = word_tokenizer({0: "<unk>", 1: "<eos>"} | special, eos_token="<eos>", unk_token="<unk>", **named)
        if outcome is None:
            with pytest.raises(ValueError, match="under an adapter"):
                separate_pad_token(peft, tokenizer)
        else:
            assert separate_pad_token(peft, tokenizer) == outcome == peft.get_base_model().config.pad_token_id
