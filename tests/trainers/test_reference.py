"""References of a trainer: built once, found again, joined to the examples, checked."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastalign.reference import PreferenceSequences, ReferenceModel, score
from fastalign.trainers import reference as trainer_reference
from fastalign.trainers.reference import ReferenceMismatchError

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def test_a_second_run_finds_every_log_prob(kit):
    pairs, held_out = kit.pairs(10), kit.pairs(5, seed=1)
    first = kit.trainer(kit.model(), pairs, held_out)
    second = kit.trainer(kit.model(), pairs, held_out, beta=2.0, loss_type="ipo")
    assert (first.reference_cache.report.cached, first.reference_cache.report.computed) == (0, 30)
    assert (second.reference_cache.report.cached, second.reference_cache.report.computed) == (30, 0)
    assert kit.reference_sums(first.train_dataset) == kit.reference_sums(second.train_dataset)


def test_cached_log_probs_are_the_references(kit):
    """Rewards from the cache equal rewards from a reference that runs beside the policy."""
    reference, policy, pairs = kit.model(seed=7), kit.model(), kit.pairs(6)
    trainer = kit.trainer(policy, pairs, ref_model=reference, max_steps=1, per_device_train_batch_size=6)
    trainer.train()
    fresh = kit.model()  # the policy before that step
    sums = [
        [float(x.sum(dtype=np.float64)) for x in score(m, list(PreferenceSequences(pairs)))] for m in (fresh, reference)
    ]
    ratios = np.subtract(*sums)
    margins = 0.5 * (ratios[0::2] - ratios[1::2])
    entry = kit.logs(trainer)[0]
    assert entry["rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert entry["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-5)


def test_reference_by_name_equals_reference_in_memory(kit):
    kit.model(seed=7).save_pretrained(kit.folder / "reference")
    pairs = kit.pairs(6)
    by_name = kit.trainer(kit.model(), pairs, ref_model=str(kit.folder / "reference"))
    in_memory = kit.trainer(kit.model(), pairs, ref_model=kit.model(seed=7))
    assert in_memory.reference_cache.report.computed == 0
    assert kit.reference_sums(by_name.train_dataset) == kit.reference_sums(in_memory.train_dataset)
    assert by_name.check_start() is None


def test_no_reference_is_held_while_training(kit):
    reference = kit.model(seed=7)
    trainer = kit.trainer(kit.model(), kit.pairs(4), ref_model=reference)
    held = [*vars(trainer).values(), *vars(trainer._reference).values()]
    assert {id(value) for value in held if isinstance(value, torch.nn.Module)} == {id(trainer.model)}


def test_wrong_log_probs_of_a_separate_reference_are_noticed(kit, monkeypatch):
    trainer = kit.trainer(kit.model(), kit.pairs(5), ref_model=kit.model(seed=7))
    monkeypatch.setattr(type(trainer.reference_cache), "lookup", kit.tampered(trainer))
    with pytest.raises(ReferenceMismatchError, match="another cache_dir"):
        kit.trainer(kit.model(), kit.pairs(5), ref_model=kit.model(seed=7))


def test_the_adapter_never_enters_the_reference(kit):
    full = kit.trainer(kit.model(), kit.pairs(6))
    adapter = kit.trainer(kit.model(), kit.pairs(6), use_peft=True, lora_target_modules=["q_proj"], seed=3)
    wrapped = kit.trainer(get_peft_model(kit.model(), LoraConfig(**LORA)), kit.pairs(6))
    assert adapter.reference_cache.report.computed == wrapped.reference_cache.report.computed == 0
    assert full.reference_cache.reference == wrapped.reference_cache.reference


def test_an_sft_adapter_is_part_of_its_reference(kit):
    torch.manual_seed(1)
    sft = get_peft_model(kit.model(), LoraConfig(**LORA, init_lora_weights=False))
    expected = [float(x.sum()) for x in score(sft, list(PreferenceSequences(kit.pairs(4))), adapter="default")]
    base = [float(x.sum()) for x in score(kit.model(), list(PreferenceSequences(kit.pairs(4))))]
    trainer = kit.trainer(sft, kit.pairs(4), max_steps=2)
    assert np.allclose([x for pair in kit.reference_sums(trainer.train_dataset) for x in pair], expected, rtol=1e-5)
    assert not np.allclose(expected, base, rtol=1e-3)
    assert trainer.check_start() == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()


def test_processes_share_the_work_through_the_folder(kit, monkeypatch):
    """Each of two processes scores half of the pairs; a folder that only one of them sees is refused."""
    model, pairs = kit.model(), kit.pairs(5)
    waiting = []

    class Process:
        num_processes, process_index, is_local_main_process = 2, 0, True

        def wait_for_everyone(self):
            waiting.append(self.process_index)

    def build(index):
        Process.process_index = index
        monkeypatch.setattr(trainer_reference, "PartialState", Process)
        own = ReferenceModel.from_model(model)
        return trainer_reference.build_cache(str(kit.folder / "cache"), own, [pairs], batch_tokens=512, progress=False)

    with pytest.raises(ValueError, match="share"):
        build(0)
    cache = build(1)
    assert cache.report.computed == 4  # pairs 1 and 3
    assert waiting == [0, 1]
    assert len(cache) == 10


def test_lengths_are_read_from_the_table(kit):
    pairs = kit.pairs(7)
    expected = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    assert trainer_reference.pair_lengths(pairs).tolist() == expected
    assert trainer_reference.pair_lengths(pairs.select([4, 1])).tolist() == [expected[4], expected[1]]
