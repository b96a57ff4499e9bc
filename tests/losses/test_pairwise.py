import math

import pytest

from fastalign.losses import DPO_LOSSES, check_dpo_options


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_every_variant_says_what_it_is(loss_type):
    variant = DPO_LOSSES[loss_type]
    assert check_dpo_options(loss_type=loss_type) is variant
    assert variant.formula
    assert "arXiv" in variant.source
    assert ("ε" in variant.formula) == variant.accepts_label_smoothing
    assert ("z" in variant.formula) == variant.accepts_length_alpha  # z is what holds α
    assert ("|y_w|" in variant.formula) == variant.needs_lengths


@pytest.mark.parametrize("option", ["label_smoothing", "length_alpha"])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_an_option_is_honoured_or_refused_by_name(loss_type, option):
    if getattr(DPO_LOSSES[loss_type], f"accepts_{option}"):
        check_dpo_options(loss_type=loss_type, **{option: 0.1})
    else:
        with pytest.raises(ValueError, match=rf"{loss_type}.*{option}.*0\.1.*'sigmoid', 'robust'"):
            check_dpo_options(loss_type=loss_type, **{option: 0.1})


def test_an_unknown_variant_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'dpo' is unknown.*" + ".*".join(map(repr, DPO_LOSSES))):
        check_dpo_options(loss_type="dpo")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("beta", value) for value in (0.0, -0.1, math.inf, math.nan)),
        *(("label_smoothing", value) for value in (-0.1, 0.5, 1.0, math.nan)),
        *(("length_alpha", value) for value in (math.inf, math.nan)),
    ],
)
def test_refuses_values_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        check_dpo_options(**{option: value})


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_asks_for_the_lengths_it_needs(loss_type):
    variant = DPO_LOSSES[loss_type]
    if variant.needs_lengths:
        with pytest.raises(ValueError, match=f"{loss_type}.*chosen_lengths and rejected_lengths"):
            check_dpo_options(loss_type=loss_type, has_lengths=False)
    else:
        check_dpo_options(loss_type=loss_type, has_lengths=False)
    if variant.accepts_length_alpha:
        with pytest.raises(ValueError, match=r"length_alpha=0\.2 needs chosen_lengths"):
            check_dpo_options(loss_type=loss_type, length_alpha=0.2, has_lengths=False)
