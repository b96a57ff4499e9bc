"""A pad token that no sequence ends with.

transformers' sequence classifiers read their score at the last token that is not `config.pad_token_id`. Where that is
the end-of-sequence token, as many tokenizers have it, the score of every finished response is read one token early.
"""

from __future__ import annotations

import re
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastalign.models.scalar import base_scalar_model

NEW_PAD_TOKEN = "<pad>"

# Spare tokens of public tokenizers, best first: <|finetune_right_pad_id|>, <|reserved_special_token_0|>, <unused0>, …
_SPARE = tuple(re.compile(pattern) for pattern in (r"^\W*pad(ding)?\W*$", r"pad", r"reserved|unused|extra_id|dummy"))
_UNCOMMON = "\ue000\U000f1234\u0378"  # private and unassigned characters: what a tokenizer does not know, if anything


def separate_pad_token(model: nn.Module, tokenizer: Any) -> int:
    """Give a scalar model and its tokenizer one pad token that ends no sequence; returns its id. Pads on the right.

    The tokenizer's own is kept unless it is an end-of-sequence token or missing. Then a spare token of the vocabulary
    takes its place (one named pad, then a reserved one, then the unknown token if text never gives it), and only then
    "<pad>" is added, with a row of embeddings where the model has none to spare.

    Plain `transformers` then gives the model's scores to whatever this tokenizer pads, on the right. (It does on the
    left too for models with rotary or relative positions; learned absolute ones are counted from the padding.)

    Raises ValueError where a token must be added under an adapter, which cannot save new embeddings of its base.
    """
    base = base_scalar_model(model)
    rows = base.get_input_embeddings().weight.shape[0]
    pad = tokenizer.pad_token_id
    if pad is None or pad in _end_tokens(base, tokenizer) or pad >= rows:
        spare = _spare_token(tokenizer, _end_tokens(base, tokenizer), rows)
        if spare is None:
            _add_pad_token(model, tokenizer, rows)
        else:
            tokenizer.pad_token = spare
    tokenizer.padding_side = "right"
    pad = int(tokenizer.pad_token_id)
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.pad_token_id = pad
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.pad_token_id = pad
    return pad


def _end_tokens(base: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Ids that end a sequence, by anyone's account."""
    found: set[int] = set()
    for owner in (tokenizer, base.config, base.config.get_text_config(), getattr(base, "generation_config", None)):
        ids = getattr(owner, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return found


def _spare_token(tokenizer: Any, taken: set[int], rows: int) -> str | None:
    special = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and index < rows and index not in taken and str(token) != tokenizer.unk_token
    }
    for pattern in _SPARE:
        if found := [(index, token) for token, index in special.items() if pattern.search(token.lower())]:
            return min(found)[1]
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in taken or unknown >= rows:
        return None
    return None if unknown in tokenizer(_UNCOMMON, add_special_tokens=False)["input_ids"] else tokenizer.unk_token


def _add_pad_token(model: nn.Module, tokenizer: Any, rows: int) -> None:
    if len(tokenizer) >= rows and isinstance(model, PeftModel):
        raise ValueError(
            "the tokenizer has no token to pad with that differs from its end-of-sequence token, and under an adapter "
            "none can be added to the base model: add one to both before (tokenizer.add_special_tokens, "
            "model.resize_token_embeddings)"
        )
    token = NEW_PAD_TOKEN
    while token in tokenizer.get_vocab():  # an ordinary word of this vocabulary, or an end token
        token = f"<{token}>"
    tokenizer.add_special_tokens({"pad_token": token})
    if len(tokenizer) > rows:
        base_scalar_model(model).resize_token_embeddings(len(tokenizer), mean_resizing=False)
