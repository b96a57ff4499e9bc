import copy
import random

import pytest
import torch
import torch.nn.functional as F

from fastalign.demo.language import Writers, ask
from fastalign.demo.sft import _pad, train_sft
from fastalign.models.causal import is_fused
from fastalign.reference import TokenSequence
from fastalign.types import IGNORE_INDEX


@pytest.fixture
def sequences(tokenizer):
    rng, result = random.Random(0), []
    for _ in range(64):
        question = ask(rng)
        prompt = tokenizer(question.prompt)["input_ids"]
        answer = tokenizer(f" {Writers().write(question, rng)}")["input_ids"]
        result.append(TokenSequence([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return result


def naive_loss(model, sequences):
    """Mean over all answer tokens, one sequence at a time, from the model's logits."""
    total, count = torch.zeros(()), 0
    for ids, start in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        total = total + F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum")
        count += len(ids) - start
    return total / count


def test_pad_aligns_targets_with_hidden_states():
    ids, mask, targets = _pad([TokenSequence([5, 6, 7, 8], 2), TokenSequence([9, 4], 1)])
    x = IGNORE_INDEX
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert targets.tolist() == [[x, 7, 8, x], [4, x, x, x]]


def test_one_step_is_that_of_a_naive_loop(model, sequences):
    naive = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(naive.parameters(), lr=1e-2, weight_decay=0.0)
    expected = naive_loss(naive, sequences)
    expected.backward()
    torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
    optimizer.step()

    notes: list[str] = []
    train_sft(model, sequences, batch_size=64, learning_rate=1e-2, seed=0, on_step=notes.append)
    assert notes == [f"loss {expected.item():.3f}"]
    for (name, ours), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)  # Adam's first step is lr·sign(gradient)
    assert not is_fused(model)
    assert not model.training


def test_training_lowers_the_loss(model, sequences):
    before = naive_loss(model, sequences).item()
    notes: list[str] = []
    train_sft(model, sequences * 4, batch_size=16, learning_rate=1e-2, seed=0, on_step=notes.append)
    assert len(notes) == 16
    assert naive_loss(model, sequences).item() < 0.6 * before
