"""What dpo_loss refuses before it computes: log-probs, lengths, tails and weights that do not fit."""

import re

import pytest
import torch

from fastalign.losses import dpo_loss


def zeros(n=6):
    return torch.zeros(n)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: torch.zeros(5)}, r"rejected_logps: shape \(5,\).*\(6,\)"),
        ({2: torch.zeros(6, 1)}, r"ref_chosen_logps: shape \(6, 1\)"),
        ({3: torch.zeros((), device="meta").expand(6)}, "ref_rejected_logps.*meta.*cpu"),
        ({2: torch.zeros(6, dtype=torch.int64)}, "ref_chosen_logps: dtype torch.int64"),
        ({0: torch.zeros(3, 2)}, r"chosen_logps: shape \(3, 2\), accepted is \(P,\)"),
        ({3: None}, "ref_rejected_logps is missing"),
    ],
)
def test_refuses_log_probs_that_do_not_fit(change, match):
    logps = [change.get(i, zeros()) for i in range(4)]
    with pytest.raises(ValueError, match=match):
        dpo_loss(*logps)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        ({"chosen_lengths": torch.ones(6)}, "rejected_lengths is missing"),
        ({"rejected_lengths": torch.ones(6)}, "chosen_lengths is missing"),
        ({"chosen_lengths": torch.ones(6), "rejected_lengths": torch.ones(5)}, r"rejected_lengths: shape \(5,\)"),
    ],
)
def test_refuses_lengths_that_do_not_fit(lengths, match):
    with pytest.raises(ValueError, match=match):
        dpo_loss(*(zeros() for _ in range(4)), **lengths)


LENGTHS = {"chosen_lengths": torch.ones(6), "rejected_lengths": torch.ones(6)}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' does not take label_smoothing"),
        ({"loss_type": "ipo"}, "'ipo' needs chosen_lengths"),
        ({"length_alpha": 0.1}, "length_alpha=0.1 needs chosen_lengths"),
        ({"reduction": "batchmean"}, "reduction='batchmean'"),
        ({"loss_type": "kto"}, "'kto' is a loss on single responses: call kto_loss"),
        ({"ld_alpha": 0.4}, "ld_alpha=0.4 needs tail_logps"),
        ({"tail_logps": [zeros()] * 4}, "tail_logps are what ld_alpha weighs"),
        ({"ld_alpha": 0.4, "tail_logps": [zeros()] * 2}, "tail_logps holds 2 tensors, accepted are 4"),
        ({"ld_alpha": 0.4, "tail_logps": [zeros()] * 3 + [zeros(5)]}, "tail_logps of ref_rejected_logps: shape (5,)"),
        ({"use_weighting": True}, "use_weighting needs weights (P,)"),
        ({"weights": torch.ones(6, requires_grad=True)}, "weights requires grad"),
        ({"weights": torch.ones(5)}, "weights: shape (5,)"),
        ({"loss_type": "aot", "weights": torch.ones(6)}, "'aot' does not take weights: its losses are of ranks"),
        ({"shift": 0.1}, "'sigmoid' does not take shift: 'bco_pair', 'bco' do"),
        ({"shift": torch.tensor(0.0)}, "'sigmoid' does not take shift"),
        ({"num_chosen_tokens": 5}, "num_chosen_tokens is the denominator of 'sft'; loss_type='sigmoid' has no such"),
        ({"loss_type": ["sigmoid", "sft"], "num_items": 9, **LENGTHS}, "loss_type='sft' then needs num_chosen_tokens"),
        ({"loss_type": ["sigmoid", "sft"], "num_chosen_tokens": 0, **LENGTHS}, "num_chosen_tokens=0: it must be"),
        ({"loss_type": ["sigmoid", "sft"]}, "'sft' needs chosen_lengths"),
    ],
)
def test_refuses_before_it_computes(given, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        dpo_loss(*(zeros() for _ in range(4)), **given)


def test_weights_alone_are_weights():
    """A pair's weight needs no flag where it is handed in."""
    weights = torch.rand(6)
    plain = dpo_loss(*(zeros() for _ in range(4)), reduction="none").loss
    assert torch.equal(dpo_loss(*(zeros() for _ in range(4)), weights=weights, reduction="none").loss, plain * weights)
