"""What `patch_trl` leaves alone, undoes and refuses. Needs TRL, see test_trl.py."""

import dataclasses

import pytest
import torch
import transformers as tf

from fastalign.integrations import patch, patch_trl, unpatch

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def trainer(kit, tmp_path):
    return kit.dpo(tmp_path)(kit.Recorder())


def test_undoing_and_patching_twice(trainer):
    before = [(dict(model.__dict__), model.forward) for model in (trainer.model, trainer.ref_model)]
    first = patch_trl(trainer)
    second = patch_trl(trainer)
    assert trainer.model.forward != before[0][1]
    second.remove()  # it found everything done
    assert trainer.model.forward != before[0][1]
    first.remove()
    for model, (attributes, forward) in zip((trainer.model, trainer.ref_model), before, strict=True):
        assert model.__dict__ == attributes
        assert model.forward == forward
    with patch_trl(trainer):
        assert trainer.ref_model.forward != before[1][1]
    assert trainer.ref_model.forward == before[1][1]


def test_generation_and_logits_are_untouched(trainer):
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    model = trainer.model.eval()
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    with patch_trl(trainer):
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), text)


def test_beside_a_patched_model(kit, trainer):
    """`patch` on the policy, before or after, changes nothing for the trainer, and the other way round."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    expected = trainer.model(**call).log_probs
    patch(trainer.model)
    with patch_trl(trainer):
        torch.testing.assert_close(trainer.model(**call).log_probs, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(trainer.model.logps(ids, torch.ones_like(ids)).logps, expected, rtol=1e-5, atol=1e-5)
        ours = trainer.model.forward
        unpatch(trainer.model)
        assert trainer.model.forward == ours
        torch.testing.assert_close(trainer.model(**call).log_probs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(trainer.model(**call).log_probs, expected)


def test_labels_shifted_beforehand(trainer):
    """As context parallelism passes them."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    shifted = ids.roll(-1, 1)
    shifted[:, :4] = shifted[0, -1] = -100
    call = {"input_ids": ids, "shift_labels": shifted, "fused_lm_head": True, "num_items_in_batch": 7}
    expected = trainer.model(**call)
    with patch_trl(trainer):
        found = trainer.model(**call)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_refusals_name_what_is_wrong(kit, trainer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"takes a TRL trainer, got LlamaForCausalLM; .*fastalign\.patch"):
        patch_trl(kit.make_model())
    plain = tf.Trainer(kit.make_model(), tf.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match=r"no fused head of TRL's.*TRL here is 1\."):
        patch_trl(plain)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="DPOTrainer runs with fsdp"):
        patch_trl(trainer)


def test_another_fused_head_is_refused_by_version(kit, trainer, tmp_path, monkeypatch):
    from trl.trainer import utils

    newer = dataclasses.make_dataclass("Newer", [("logit_variance", object, None)], bases=(utils.FusedCausalLMOutput,))
    monkeypatch.setattr(utils, "FusedCausalLMOutput", newer)
    with pytest.raises(ValueError, match=r"another fused head.*logit_variance"):
        patch_trl(trainer)
    monkeypatch.undo()
    model = kit.make_model()
    utils.add_fused_lm_head(model, outputs=("log_probs", "logit_variance"))
    trainer.model = model
    with pytest.raises(ValueError, match=r"asks for \['logit_variance'\]"):
        patch_trl(trainer)
