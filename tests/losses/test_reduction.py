import pytest
import torch

from fastalign.losses import REDUCTIONS, check_reduction, reduce_losses

LOSSES = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 3.0), ("sum", 9.0)])
def test_reduces_to_a_number(reduction, expected):
    assert reduce_losses(LOSSES, reduction).item() == expected


def test_none_returns_the_losses():
    assert reduce_losses(LOSSES, "none") is LOSSES


@pytest.mark.parametrize("num_items", [6, torch.tensor(6), torch.tensor(6.0)])
def test_num_items_is_the_denominator(num_items):
    assert reduce_losses(LOSSES, num_items=num_items).item() == 1.5


def test_no_items_give_a_zero_in_the_graph():
    empty = torch.zeros(0, requires_grad=True)
    loss = reduce_losses(empty * 2)
    assert loss.item() == 0
    loss.backward()
    assert empty.grad is not None


@pytest.mark.parametrize("reduction", sorted({*REDUCTIONS} - {"mean"}))
def test_refuses_a_num_items_it_would_not_use(reduction):
    with pytest.raises(ValueError, match=f"num_items.*{reduction}"):
        reduce_losses(LOSSES, reduction, 3)


@pytest.mark.parametrize(
    ("reduction", "num_items", "match"),
    [("average", None, "'average'.*'mean', 'sum', 'none'"), ("mean", 0, "num_items=0"), ("mean", -2, "num_items=-2")],
)
def test_refuses_unknown_values(reduction, num_items, match):
    with pytest.raises(ValueError, match=match):
        check_reduction(reduction, num_items)
