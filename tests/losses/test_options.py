"""Every option is honoured, or refused by a message that names it."""

import math
import re

import pytest
import torch

from fastalign.losses import DPO_LOSSES, F_DIVERGENCES, DPOOptions, check_dpo_options, dpo_loss
from fastalign.losses.options import _EVERYWHERE

# a value other than the default for every option that a variant may refuse
OTHER = {
    "label_smoothing": 0.1,
    "length_alpha": 0.1,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.3,
    "discopop_tau": 0.1,
    "ld_alpha": 0.4,
    "use_weighting": True,
    "simpo_gamma": 1.0,
    "cpo_alpha": 0.5,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
}


def with_needed(loss_type, options):
    """What a variant cannot do without."""
    needed = {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    if options.keys() == {"f_alpha_divergence_coef"}:
        needed["f_divergence_type"] = "alpha_divergence"
    return {"loss_type": loss_type} | needed | options


def test_no_option_escapes():
    assert {*OTHER, *_EVERYWHERE} == set(DPOOptions._fields)


@pytest.mark.parametrize("option", OTHER)
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_an_option_is_honoured_or_refused_by_name(loss_type, option):
    options = with_needed(loss_type, {option: OTHER[option]})
    variant = DPO_LOSSES[loss_type]
    if getattr(variant, f"accepts_{option}"):
        assert check_dpo_options(**options) == (variant,)
        return
    given = "f_divergence_type" if option == "f_alpha_divergence_coef" else option  # refused before it
    able = [repr(name) for name, entry in DPO_LOSSES.items() if given in entry.options]
    with pytest.raises(ValueError, match=re.escape(f"'{loss_type}' does not take {given} (given ")) as error:
        check_dpo_options(**options)
    assert str(error.value).endswith(f": {', '.join(able)} do")


@pytest.mark.parametrize("option", OTHER)
def test_an_honoured_option_changes_the_loss(make_call, option):
    """Not only accepted: it does something, in each variant that takes it."""
    for loss_type, variant in DPO_LOSSES.items():
        if option not in variant.options or variant.rows == "responses":
            continue
        plain = with_needed(loss_type, {})
        if option == "f_alpha_divergence_coef":
            plain["f_divergence_type"] = "alpha_divergence"
        changed = plain | ({option: 0.2} if option == "label_smoothing" else {option: OTHER[option]})
        before, after = (make_call(options)(reduction="none").loss for options in (plain, changed))
        assert ((before - after).abs() > 1e-6).any(), loss_type


@pytest.mark.parametrize("alone", [["apo_zero", "sigmoid"], ["sft", "nca_pair", "hinge"]])
def test_in_a_list_one_that_honours_it_is_enough(alone):
    check_dpo_options(loss_type=alone, length_alpha=0.1)
    check_dpo_options(loss_type=alone, f_divergence_type="js_divergence")
    with pytest.raises(
        ValueError, match=re.escape(f"loss_type={alone} does not take simpo_gamma (given 1.0): 'simpo'")
    ):
        check_dpo_options(loss_type=alone, simpo_gamma=1.0)


@pytest.mark.parametrize("name", ["dpo", "Sigmoid", "kto_pair"])
def test_an_unknown_variant_is_answered_with_the_known_ones(name):
    for loss_type in (name, ["sigmoid", name]):
        with pytest.raises(ValueError, match=f"'{name}' is unknown.*" + ".*".join(map(repr, DPO_LOSSES))):
            check_dpo_options(loss_type=loss_type)


@pytest.mark.parametrize(
    ("refused", "match"),
    [
        ({"loss_type": []}, r"loss_type=\[\] is empty"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "names a loss twice: give it a weight in loss_weights"),
        ({"loss_type": ["sigmoid", "kto"]}, "'kto' is a loss on single responses and stands alone"),
        ({"loss_type": ["kto", "bco"]}, "'kto' is a loss on single responses and stands alone"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"loss_weights=\[1.0\] has 1 numbers for 2"),
        ({"loss_weights": [1.0, 1.0]}, r"loss_weights=\[1.0, 1.0\] has 2 numbers for 1"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -1.0]}, "finite and not negative"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [math.nan, 1.0]}, "finite and not negative"),
        ({"loss_type": "exo_pair"}, "exo_pair.*label_smoothing: it must be above 0"),
        ({"f_divergence_type": "kl"}, "'kl' is unknown: accepted are " + ", ".join(map(repr, F_DIVERGENCES))),
        ({"f_alpha_divergence_coef": 0.3}, "goes with f_divergence_type='alpha_divergence', given 'reverse_kl'"),
        ({"loss_type": ["aot", "sigmoid"], "use_weighting": True}, "losses are of ranks, not of pairs"),
        ({"loss_type": "aot", "use_weighting": True}, "'aot' does not take use_weighting"),
    ],
)
def test_refuses_what_does_not_go_together(refused, match):
    with pytest.raises(ValueError, match=match):
        check_dpo_options(**refused)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("beta", value) for value in (0.0, -0.1, math.inf, math.nan)),
        *(("label_smoothing", value) for value in (-0.1, 0.5, 1.0, math.nan)),
        *(("length_alpha", value) for value in (math.inf, math.nan)),
        *(("f_alpha_divergence_coef", value) for value in (math.inf, math.nan)),
        *(("discopop_tau", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *(("ld_alpha", value) for value in (-0.1, 1.1, math.nan)),
        *(("simpo_gamma", value) for value in (math.inf, math.nan)),
        *(("cpo_alpha", value) for value in (-1.0, math.inf, math.nan)),
        *(("desirable_weight", value) for value in (-1.0, math.inf, math.nan)),
        *(("undesirable_weight", value) for value in (-1.0, math.inf, math.nan)),
    ],
)
def test_refuses_values_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        check_dpo_options(**{option: value})


def test_an_option_that_no_loss_has_is_a_type_error():
    with pytest.raises(TypeError, match="label_smothing"):
        check_dpo_options(label_smothing=0.1)


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_asks_for_the_lengths_it_needs(loss_type):
    variant = DPO_LOSSES[loss_type]
    options = with_needed(loss_type, {})
    if variant.needs_lengths:
        with pytest.raises(ValueError, match=f"{loss_type}.*chosen_lengths and rejected_lengths"):
            check_dpo_options(**options, has_lengths=False)
    else:
        check_dpo_options(**options, has_lengths=False)
    if variant.accepts_length_alpha:
        with pytest.raises(ValueError, match=r"length_alpha=0\.2 needs chosen_lengths"):
            check_dpo_options(**options, length_alpha=0.2, has_lengths=False)


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_a_reference_is_there_where_it_is_looked_at_and_nowhere_else(loss_type):
    variant = DPO_LOSSES[loss_type]
    options = with_needed(loss_type, {})
    check_dpo_options(**options, has_reference=variant.needs_reference)
    match = "would be ignored; leave them out" if not variant.needs_reference else "which are missing"
    with pytest.raises(ValueError, match=f"{loss_type}.*{match}"):
        check_dpo_options(**options, has_reference=not variant.needs_reference)
    if variant.rows == "pairs":
        logps = [torch.full((2,), -5.0)] * (2 if variant.needs_reference else 4)
        with pytest.raises(ValueError, match=match):
            dpo_loss(*logps, chosen_lengths=torch.ones(2), rejected_lengths=torch.ones(2), **options)


def test_a_list_looks_at_the_reference_if_one_of_it_does():
    check_dpo_options(loss_type=["simpo", "sft"], has_reference=False)
    check_dpo_options(loss_type=["simpo", "sigmoid"], has_reference=True)
    with pytest.raises(ValueError, match="missing"):
        check_dpo_options(loss_type=["simpo", "sigmoid"], has_reference=False)
    with pytest.raises(ValueError, match="ignored"):
        check_dpo_options(loss_type=["simpo", "sft"], has_reference=True)
