"""The check before the first step."""

import math

import pytest

from fastalign.trainers.reference import ReferenceMismatchError


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm"])
def test_starts_at_its_reference(kit, loss_type):
    trainer = kit.trainer(kit.model(), kit.pairs(6), loss_type=loss_type)
    expected = {"hinge": 1.0, "ipo": 1.0}.get(loss_type, math.log(2))  # ipo: (0 − 1/(2·0.5))²
    assert trainer.check_start() == pytest.approx(expected, abs=1e-5)


def test_length_penalty_moves_the_start(kit):
    pairs = kit.pairs(6)
    trainer = kit.trainer(kit.model(), pairs, length_alpha=0.1)
    assert abs(trainer.check_start() - math.log(2)) > 1e-3


def test_the_references_own_checkpoint_is_recognised(kit):
    kit.model().save_pretrained(kit.folder / "sft")
    path = str(kit.folder / "sft")
    trainer = kit.trainer(path, kit.pairs(4), ref_model=path)
    assert trainer.check_start() == pytest.approx(math.log(2), abs=1e-5)


def test_wrong_log_probs_are_noticed_before_training(kit, monkeypatch):
    trainer = kit.trainer(kit.model(), kit.pairs(5))
    monkeypatch.setattr(type(trainer.reference_cache), "lookup", kit.tampered(trainer))
    second = kit.trainer(kit.model(), kit.pairs(5))
    with pytest.raises(ReferenceMismatchError, match=r"pair \d \(row \d of the data set\)"):
        second.train()
