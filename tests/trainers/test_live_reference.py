"""References that stay in memory: scored batch by batch, as the cache has them; refused where they cannot be had."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.trainers.live_reference import LiveReference

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
SAME = ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "entropy")


def run(kit, reference=None, n=8, **settings):
    pairs = kit.labelled(n) if settings.get("loss_type") == "kto" else kit.pairs(n)
    settings = {"max_steps": 3, "learning_rate": 0.02, "train_sampling_strategy": "sequential"} | settings
    trainer = kit.trainer(kit.model(), pairs, ref_model=reference, **settings)
    start = trainer.check_start()
    trainer.train()
    return start, kit.logs(trainer), trainer


@pytest.mark.parametrize(
    "settings", [{}, {"ld_alpha": 0.4}, {"loss_type": "kto"}, {"loss_type": "aot"}, {"use_peft": True}], ids=str
)
@pytest.mark.parametrize("kind", ["own", "separate", "by name"])
def test_a_live_reference_gives_what_the_cache_gives(kit, settings, kind):
    kit.model(seed=7).save_pretrained(kit.folder / "reference")
    references = {"own": None, "separate": kit.model(seed=7), "by name": str(kit.folder / "reference")}
    if settings.get("use_peft"):
        settings = settings | {"lora_target_modules": ["q_proj"]}
    live_start, live, trainer = run(kit, references[kind], precompute_ref_log_probs=False, **settings)
    assert not (kit.folder / "cache").exists()
    with pytest.raises(ValueError, match="kept on disk"):
        _ = trainer.reference_cache
    start, cached, _ = run(kit, references[kind], **settings)
    assert live_start == (None if start is None else pytest.approx(start, abs=1e-5))
    assert (start is None) == (kind != "own")
    for a, b in zip(live, cached, strict=True):
        for name in SAME:
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), name


def test_the_policys_adapter_is_off_while_it_stands_for_its_reference(kit):
    """After training, the reference of a LoRA policy is still the base; trainable parameters stay trainable."""
    _, _, trainer = run(kit, precompute_ref_log_probs=False, use_peft=True, lora_target_modules=["q_proj"])
    assert trainer._reference._model is None
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainable = [p.requires_grad for p in trainer.model.parameters()]
    attached = trainer._reference.attach(batch, trainer.model)
    assert [p.requires_grad for p in trainer.model.parameters()] == trainable
    base = kit.trainer(kit.model(), kit.pairs(8))
    expected = base.data_collator([base.train_dataset[i] for i in range(4)])
    np.testing.assert_allclose(attached["ref_logps"], expected["ref_logps"], rtol=1e-5)
    np.testing.assert_allclose(attached["ref_per_token_logps"], expected["ref_per_token_logps"], atol=1e-5)


def test_data_can_be_evaluated_at_any_time(kit):
    _, _, trainer = run(kit, precompute_ref_log_probs=False)
    assert "eval_loss" in trainer.evaluate(kit.pairs(3, seed=9))


def test_references_that_cannot_be_had_are_refused(kit):
    adapter = get_peft_model(kit.model(), LoraConfig(**LORA, init_lora_weights=False))
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=False.*adapter"):
        kit.trainer(adapter, kit.pairs(4), precompute_ref_log_probs=False)
    with pytest.raises(ValueError, match=r"sync_ref_model=True.*adapter"):
        kit.trainer(adapter, kit.pairs(4), sync_ref_model=True)
    with pytest.raises(ValueError, match=r"sync_ref_model=True.*adapter"):
        kit.trainer(kit.model(), kit.pairs(4), sync_ref_model=True, peft_config=LoraConfig(**LORA))
    for other, message in (
        (kit.model(num_hidden_layers=1), "do not both have"),
        (kit.model(intermediate_size=56), "must be alike"),
        (kit.model().bfloat16(), "must be alike"),
    ):
        with pytest.raises(ValueError, match=message):
            kit.trainer(kit.model(), kit.pairs(4), ref_model=other, sync_ref_model=True)


def test_a_reference_is_saved_and_loaded_to_the_bit(kit, tmp_path):
    trainer = kit.trainer(kit.model(), kit.pairs(4), sync_ref_model=True)
    reference = trainer._reference
    assert isinstance(reference, LiveReference)
    before = {name: p.detach().clone() for name, p in reference._model.named_parameters()}
    reference.save(tmp_path)
    with torch.no_grad():
        for p in reference._model.parameters():
            p.zero_()
    reference.load(tmp_path)
    kit.assert_same(dict(reference._model.named_parameters()), before, rtol=0, atol=0)
    other = kit.trainer(kit.model(num_hidden_layers=1), kit.pairs(4), sync_ref_model=True)
    with pytest.raises(ValueError, match="another model"):
        other._reference.load(tmp_path)


def test_tied_weights_are_mixed_once(kit):
    trainer = kit.trainer(
        kit.model(tie_word_embeddings=True), kit.pairs(4), sync_ref_model=True, ref_model_mixup_alpha=0.25
    )
    head = trainer._reference._model.lm_head.weight
    start = head.detach().clone()
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    trainer._reference.follow(trainer.model)
    torch.testing.assert_close(head, start + 0.25)
    assert trainer._reference._model.model.embed_tokens.weight is head
