"""A tokenizer of whole words and a Llama of a hundred thousand parameters, both made here: nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastalign.demo.language import vocabulary

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_SPACE = "▁"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with its leading space as SentencePiece has it, or a mark; decoding gives the text back."""
    marks = [".", ",", ":", "?"]
    tokens = [*_SPECIAL, *marks, *(_SPACE + word for word in vocabulary())]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",  # for generation; training pads by itself
        model_max_length=256,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A two-layer Llama for the tokenizer's vocabulary, float32, random weights that depend on `seed` alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.08,  # at this width the usual 0.02 costs hundreds of steps before attention looks anywhere
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
