"""Small tokenizers trained on the spot, each with a habit of real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
WORDS = "the answer is yes and no but maybe not now because answers change when questions change yesterday nowhere"
CORPUS = [WORDS, "Question: is the sky blue?\nAnswer: yes it is", "User: hello there\nAssistant: hello to you"] * 50

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Make = Callable[..., Any]


def _wrap(tokenizer: Tokenizer, *, bos: bool, eos: bool, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that adds <s> before and </s> after a text, as asked."""
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")],
        )
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


@pytest.fixture(scope="session")
def byte_bpe() -> Make:
    """make(bos, eos, words, **kwargs): byte-level BPE as GPT-2's; with words=False tokens reach across spaces."""

    def make(*, bos: bool = False, eos: bool = False, words: bool = True, **kwargs: Any) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        return _wrap(tokenizer, bos=bos, eos=eos, **kwargs)

    return make


@pytest.fixture(scope="session")
def metaspace_bpe() -> Make:
    """make(bos, eos, **kwargs): BPE that puts a space before every text, as Llama 2's does."""

    def make(*, bos: bool = True, eos: bool = False, **kwargs: Any) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = [chr(c) for c in range(32, 127)] + ["\n"]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        return _wrap(tokenizer, bos=bos, eos=eos, **kwargs)

    return make


@pytest.fixture(scope="session")
def text_tokenizer(byte_bpe: Make) -> Any:
    """Byte-level BPE with <s> before a text and no chat template."""
    return byte_bpe(bos=True)


@pytest.fixture(scope="session")
def chat_tokenizer(byte_bpe: Make) -> Any:
    """Byte-level BPE with <s> before a text and a chat template that writes <s> itself and ends turns with </s>."""
    return byte_bpe(bos=True, chat_template=CHAT_TEMPLATE)
