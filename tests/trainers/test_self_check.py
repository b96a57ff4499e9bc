"""The check before the first step."""

import math

import pytest

from fastalign.losses import DPO_LOSSES
from fastalign.trainers import dpo as trainer_dpo
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


OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1}, "bco_pair": {"bco_running_shift": True}, "ld": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True}, "several": {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1, 0.5, 2]},
    "js": {"f_divergence_type": "js_divergence", "length_alpha": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", [*DPO_LOSSES, "ld", "wpo", "several", "js"])
def test_every_loss_starts_where_policy_and_reference_agree(kit, name, monkeypatch):
    """The check compares with the formula at the reference; it fails where the trained loss is another one."""
    settings = ({"loss_type": name} if name in DPO_LOSSES else {}) | OPTIONS.get(name, {})
    data = kit.labelled(6) if DPO_LOSSES.get(name, DPO_LOSSES["sigmoid"]).rows == "responses" else kit.pairs(6)
    trainer = kit.trainer(kit.model(), data, **settings)
    got = trainer.check_start()
    if not trainer.args.needs_reference:
        assert got is None
        return
    original = trainer_dpo.fused_loss

    def another(*args):
        return lambda hidden, head: (out := original(*args)(hidden, head))._replace(loss=out.loss * 1.5 + 0.2)

    monkeypatch.setattr(trainer_dpo, "fused_loss", another)
    with pytest.raises(ReferenceMismatchError, match="before training the loss"):
        trainer.check_start()


def test_wrong_log_probs_of_mismatched_responses_are_noticed(kit):
    trainer = kit.trainer(kit.model(), kit.labelled(6), loss_type="kto")
    assert trainer.check_start() == pytest.approx(0.5, abs=1e-5)
    wrong = trainer.train_dataset.with_format(None).map(
        lambda e: {"ref_kl_logps": [x - 0.5 for x in e["ref_kl_logps"]]}
    )
    trainer.train_dataset = wrong.with_format("numpy")
    with pytest.raises(ReferenceMismatchError, match=r"kl_completion_ids of example \d \(row \d"):
        trainer.check_start()
