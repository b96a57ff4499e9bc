"""The dict of losses says of each what it needs and takes, and the code agrees."""

import inspect
import re
from typing import ClassVar

import pytest

from fastalign.linear import linear_dpo_loss, linear_kto_loss
from fastalign.losses import DPO_LOSSES, DPOOptions, check_dpo_options, dpo_loss, kto_loss

TABLE = [
    *("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "simpo", "orpo", "cpo"),
    *("kto", "bco", "apo_zero_unpaired"),
]
REWARD_DIFFERENCE = {"sigmoid", "robust", "hinge", "exo_pair", "discopop"}


def test_the_table_is_whole():
    assert list(DPO_LOSSES) == TABLE


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_every_variant_says_what_it_is(loss_type):
    variant = DPO_LOSSES[loss_type]
    needed = {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    assert check_dpo_options(loss_type=loss_type, **needed) == (variant,)
    assert "arXiv" in variant.source
    formula = variant.formula.replace("z₀", "kl")
    assert ("ε" in formula) == variant.accepts_label_smoothing
    assert ("z" in formula) == variant.accepts_length_alpha  # z is what holds α
    assert ("z" in formula or "f(s" in formula) == variant.accepts_f_divergence
    assert ("|y_w|" in formula) == variant.needs_lengths
    assert ("sort" in formula) == variant.couples_batch
    assert ("δ" in formula) == variant.accepts_shift
    if variant.rows == "pairs":
        assert bool(re.search("(?<!logp)s_w|z|ref_logps", formula)) == variant.needs_reference
    assert (variant.rows == "responses") == ("desirable_weight" in variant.options)


def test_only_functions_of_the_reward_difference_take_alpha():
    assert {name for name, variant in DPO_LOSSES.items() if variant.accepts_length_alpha} == REWARD_DIFFERENCE


def test_f_divergences_are_for_losses_of_a_difference():
    taking = {name for name, variant in DPO_LOSSES.items() if variant.accepts_f_divergence}
    assert taking == {*REWARD_DIFFERENCE, "ipo", "sigmoid_norm"}


def test_what_needs_what():
    def which(attribute):
        return {name for name, variant in DPO_LOSSES.items() if getattr(variant, attribute)}

    assert set(DPO_LOSSES) - which("needs_reference") == {"sft", "simpo", "orpo", "cpo"}
    assert which("couples_batch") == {"aot", "aot_unpaired"}
    assert which("needs_kl") == {"kto"}
    assert which("needs_shift") == {"bco"}
    assert which("accepts_shift") == {"bco", "bco_pair"}
    assert {name for name, variant in DPO_LOSSES.items() if variant.rows == "responses"} == {
        "kto", "bco", "apo_zero_unpaired",
    }  # fmt: skip


def test_a_misspelt_question_is_an_error():
    assert DPO_LOSSES["sigmoid"].accepts_weighting
    assert DPO_LOSSES["sigmoid"].accepts_use_weighting
    for name in ("accepts_label_smothing", "accepts_", "needs_label_smoothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(DPO_LOSSES["sigmoid"], name)
    for variant in DPO_LOSSES.values():
        assert set(variant.options) <= set(DPOOptions._fields)


class TestDefaults:
    """One fact, one default: the functions' signatures repeat those of DPOOptions, and a test sees that they do."""

    ours: ClassVar = DPOOptions._field_defaults

    @pytest.mark.parametrize("fn", [dpo_loss, linear_dpo_loss, kto_loss, linear_kto_loss])
    def test_signatures(self, fn):
        parameters = inspect.signature(fn).parameters
        shared = [name for name in self.ours if name in parameters]
        for name in shared:
            expected = "kto" if name == "loss_type" and "kto" in fn.__name__ else self.ours[name]
            assert parameters[name].default == expected, name
        rows = "responses" if "kto" in fn.__name__ else "pairs"
        taken = {option for variant in DPO_LOSSES.values() if variant.rows == rows for option in variant.options}
        assert taken <= set(shared)

    @pytest.mark.parametrize("fused", [(dpo_loss, linear_dpo_loss), (kto_loss, linear_kto_loss)])
    def test_fused_functions_take_the_same_options(self, fused):
        plain, linear = (set(inspect.signature(fn).parameters) for fn in fused)
        tensors = {
            *("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
            *("chosen_lengths", "rejected_lengths", "tail_logps", "weights", "logps"),
        }
        assert plain - linear <= tensors  # what the fused function finds out by itself


def test_entries_are_immutable():
    with pytest.raises(AttributeError):
        DPO_LOSSES["sigmoid"].formula = "0"
