import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastalign.demo.language import Writers, ask
from fastalign.demo.model import build_model, build_tokenizer

TOKENIZER = build_tokenizer()


@given(st.integers(0, 10_000))
def test_the_tokenizer_gives_the_text_back_and_keeps_the_boundary(seed):
    rng = random.Random(seed)
    question = ask(rng)
    answer = Writers().write(question, rng)
    prompt = TOKENIZER(question.prompt)["input_ids"]
    whole = TOKENIZER(f"{question.prompt} {answer}")["input_ids"]
    assert TOKENIZER.unk_token_id not in whole
    assert TOKENIZER.decode(whole) == f"{question.prompt} {answer}"
    assert whole == prompt + TOKENIZER(f" {answer}")["input_ids"]
    assert TOKENIZER.decode(whole[len(prompt) :]) == answer


def test_special_tokens_differ():
    ids = {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}
    assert len(ids) == 3
    assert TOKENIZER("Shopper: price of gold?")["input_ids"].count(TOKENIZER.unk_token_id) == 1


def test_the_model_depends_on_the_seed_alone_and_leaves_the_random_state():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = build_model(TOKENIZER, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = build_model(TOKENIZER, 5), build_model(TOKENIZER, 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.shape == (len(TOKENIZER), 64)
    assert sum(p.numel() for p in one.parameters()) < 150_000
