"""Batches by a token budget: every example once, never over the budget, the same whenever they are made again."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.trainers.token_batches import ExampleTokens, TokenBatches, example_tokens

EXAMPLE = st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=4))
LAYOUTS = ("padded", "packed", "shared")


def tokens_of(examples) -> ExampleTokens:
    prompt = np.array([p for p, _ in examples])
    count = np.array([len(r) for _, r in examples])
    longest = np.array([max(r) for _, r in examples])
    total = np.array([sum(r) for _, r in examples])
    return ExampleTokens(count, prompt + longest, count * prompt + total, prompt)


def cost(examples, layout: str) -> int:
    """Of a batch, by hand."""
    if layout == "padded":
        width = max(p + max(r) for p, r in examples)
        return width * sum(len(r) for _, r in examples)
    return sum((p if layout == "shared" else p * len(r)) + sum(r) for p, r in examples)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(EXAMPLE, min_size=1, max_size=60), st.sampled_from(LAYOUTS), st.integers(160, 600), st.booleans(),
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 3),
)  # fmt: skip
def test_batches_partition_the_examples(examples, layout, budget, shuffle, processes, accumulation, seed):
    samplers = [
        TokenBatches(
            tokens_of(examples), budget, layout, seed=seed, shuffle=shuffle, stride=processes * accumulation,
            process_index=r, num_processes=processes,
        )
        for r in range(processes)
    ]  # fmt: skip
    assert len({len(sampler) for sampler in samplers}) == 1
    for epoch in (0, 1, 7):
        shares = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler)  # of every epoch
            assert shares[-1] == list(sampler)
        batches = [batch for share in shares for batch in share]
        for batch in batches:
            assert cost([examples[i] for i in batch], layout) <= budget
        used = sorted(i for batch in batches for i in batch)
        if max(map(len, batches)) > 1 or len(examples) % processes == 0:
            assert used == list(range(len(examples)))
        else:  # nothing to halve: some are used twice, so that all processes have as many
            assert sorted(set(used)) == list(range(len(examples)))
            assert len(used) < len(examples) + processes
        if not shuffle:
            steps = [share[k] for k in range(len(samplers[0])) for share in shares]
            in_order = [i for batch in steps for i in batch]
            assert in_order[: len(examples)] == list(range(len(examples)))


def real_lengths(n: int = 400) -> ExampleTokens:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(3.5, 0.6, (n, 3)).astype(int) + 4
    return tokens_of([(int(p), [int(a), int(b)]) for p, a, b in lengths])


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_batches_are_full(layout):
    tokens = real_lengths()
    sampler = TokenBatches(tokens, 2048, layout, seed=0)
    fewest = tokens.computed(layout).sum() / 2048
    assert len(sampler) <= 1.08 * fewest + 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_epochs_differ_and_seeds_decide(layout):
    def batches(seed, epoch):
        return [b.tolist() for b in TokenBatches(real_lengths(), 2048, layout, seed=seed).epoch_batches(epoch)]

    assert batches(0, 0) == batches(0, 0)
    assert batches(0, 3) == batches(0, 3)
    first = {tuple(batch) for batch in batches(0, 0)}
    for other in (batches(0, 1), batches(1, 0)):
        assert len(first & {tuple(batch) for batch in other}) < len(first) / 4  # who is with whom changes
    sampler = TokenBatches(real_lengths(), 2048, layout, seed=0)
    companions = {i for epoch in range(40) for batch in sampler.epoch_batches(epoch) if 0 in batch for i in batch}
    assert len(companions) > 20  # over the epochs


def test_processes_have_equal_work():
    tokens = real_lengths()
    samplers = [
        TokenBatches(tokens, 2048, "shared", seed=0, stride=4, process_index=r, num_processes=4) for r in range(4)
    ]
    sizes = tokens.computed("shared")
    work = np.array([[sizes[batch].sum() for batch in sampler] for sampler in samplers])
    shares = np.sort(work.min(0) / work.max(0))
    assert shares[0] > 0.8  # of what is left over, dealt out
    assert shares[1] > 0.95


def test_drop_last_leaves_out_what_is_left_over():
    for drop in (False, True):
        samplers = [
            TokenBatches(real_lengths(50), 400, "packed", seed=0, process_index=r, num_processes=3, drop_last=drop)
            for r in range(3)
        ]
        seen = sorted(i for sampler in samplers for batch in sampler for i in batch)
        assert (seen == list(range(50))) != drop
        assert len(set(seen)) == len(seen)


def test_an_example_over_the_budget_is_refused_by_name():
    with pytest.raises(ValueError, match=r"max_tokens_per_batch=50: example 1 has 60 tokens in the packed layout"):
        TokenBatches(tokens_of([(5, [5, 5]), (20, [10, 10])]), 50, "packed", seed=0)
    assert len(TokenBatches(tokens_of([(5, [5, 5]), (20, [10, 10])]), 50, "shared", seed=0)) == 2


COLUMNS = {
    "pairs": {"prompt_ids": [[1, 2], [3]], "chosen_ids": [[4], [5, 6]], "rejected_ids": [[7, 8, 9], [1]]},
    "lists": {"prompt_ids": [[1, 2], [3]], "response_ids": [[[4], [7, 8, 9]], [[5, 6], [1]]], "ranks": [[1, 2]] * 2},
    "labels": {"prompt_ids": [[1, 2], [3]], "completion_ids": [[4], [5, 6]], "label": [True, False]},
    "sequences": {"input_ids": [[1, 2, 3], [4]], "completion_mask": [[False, True, True], [True]]},
}  # fmt: skip
EXPECTED = {
    "pairs": ([2, 2], [5, 3], [8, 5], [2, 1]), "lists": ([2, 2], [5, 3], [8, 5], [2, 1]),
    "labels": ([1, 1], [3, 3], [3, 3], [2, 1]), "sequences": ([1, 1], [3, 1], [3, 1], [0, 0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
def test_lengths_of_all_trainers_examples(kind):
    found = example_tokens(Dataset.from_dict(COLUMNS[kind]))
    assert tuple(part.tolist() for part in found) == EXPECTED[kind]
    picked = example_tokens(Dataset.from_dict(COLUMNS[kind]).select([1]))  # a view of a table
    assert tuple(part.tolist() for part in picked) == tuple(part[1:] for part in EXPECTED[kind])


def test_other_data_are_refused():
    with pytest.raises(ValueError, match="needs tokenised examples, and the data have the columns text"):
        example_tokens(Dataset.from_dict({"text": ["a"]}))


# ---- in training

RUNS = {
    "dpo": lambda kit, **s: kit.trainer(kit.model(), kit.pairs(22), **s),
    "pro": lambda kit, **s: kit.pro(kit.model(), kit.lists(22), **s),
    "sft": lambda kit, **s: kit.sft(kit.model(), kit.sequences(22), **s),
    "kto": lambda kit, **s: kit.trainer(kit.model(), kit.labelled(22), loss_type="kto", **s),
}


def seen_batches(trainer):
    """Tokens of every batch that training took, as the layout computes them."""
    from fastalign.trainers.batches import computed_tokens

    found, original = [], trainer.training_step

    def noting(model, inputs, *args):
        found.append(computed_tokens(inputs, trainer.token_layout))
        return original(model, inputs, *args)

    trainer.training_step = noting
    trainer.train()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", RUNS)
def test_training_keeps_the_budget(kit, kind, layout):
    trainer = RUNS[kind](
        kit, max_tokens_per_batch=180, token_layout=layout, num_train_epochs=2, learning_rate=0.01, micro_batch_tokens=0
    )
    found = seen_batches(trainer)
    assert max(found) <= 180
    assert len(found) == 2 * len(trainer.get_train_dataloader())
    assert len(set(found)) > 1
    assert trainer.state.num_train_epochs == 2


def test_reward_models_train_by_a_budget(rewards):
    for kind in ("pairs", "lists", "scalar"):
        trainer = rewards.trainer(rewards.model(), rewards.data(kind, 22), max_tokens_per_batch=180, learning_rate=0.01)
        assert max(seen_batches(trainer)) <= 180


def test_the_loss_is_a_mean_over_the_step(kit):
    """However a step's pairs are cut: two batches a step, or one of twice the budget in pieces, sequentially."""
    settings = {"train_sampling_strategy": "sequential", "max_steps": 1, "backend": "torch", "token_layout": "packed"}
    runs = []
    for split in (
        {"max_tokens_per_batch": 150, "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 150, "gradient_accumulation_steps": 2, "micro_batch_tokens": 50},
    ):
        trainer = kit.trainer(kit.model().double(), kit.pairs(22), **settings, **split)
        trainer.train()
        runs.append((kit.weights(trainer), kit.logs(trainer)[0]))
    trainer_pairs = len(trainer.get_train_dataloader().batch_sampler.epoch_batches(0)[0])
    second = len(trainer.get_train_dataloader().batch_sampler.epoch_batches(0)[1])
    whole = kit.trainer(
        kit.model().double(), kit.pairs(22), per_device_train_batch_size=trainer_pairs + second, **settings
    )
    whole.train()
    for weights, log in runs:
        kit.assert_same(weights, kit.weights(whole), rtol=1e-9, atol=1e-11)
        assert log["loss"] == pytest.approx(kit.logs(whole)[0]["loss"], rel=1e-9)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_resumed_training_is_the_same_to_the_bit(kit, kind):
    settings = {
        "max_tokens_per_batch": 150 if kind == "dpo" else 40, "num_train_epochs": 2, "save_strategy": "steps",
        "save_steps": 3, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01,
    }  # fmt: skip
    whole = RUNS[kind](kit, **settings)
    whole.train()
    assert whole.state.global_step > 4
    again = RUNS[kind](kit, **settings)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    kit.assert_same(kit.weights(again), kit.weights(whole), rtol=0, atol=0)
    for a, b in zip(kit.logs(again), kit.logs(whole), strict=True):
        assert a["loss"] == b["loss"]
        assert a["num_tokens"] == b["num_tokens"]


def test_loader_workers_make_the_same_batches(kit):
    runs = []
    for workers in (0, 2):
        trainer = kit.trainer(
            kit.model(), kit.pairs(22), max_tokens_per_batch=180, dataloader_num_workers=workers, seed=3
        )
        loader = trainer.get_train_dataloader()
        loader.set_epoch(1)
        runs.append([batch["input_ids"] for batch in loader])
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0: a positive number"),
        ({"max_tokens_per_batch": 99, "train_sampling_strategy": "group_by_length"}, "'group_by_length'"),
        ({"max_tokens_per_batch": 99, "auto_find_batch_size": True}, "auto_find_batch_size has no effect"),
        (
            {"max_tokens_per_batch": 99, "accelerator_config": {"split_batches": True}},
            "split_batches=True with max_tok",
        ),
        ({"max_tokens_per_batch": 99, "loss_type": "aot"}, "max_tokens_per_batch=99: loss_type='aot' sorts over"),
    ],
)
def test_what_does_not_go_with_a_budget(kit, settings, message):
    with pytest.raises(ValueError, match=message):
        kit.config(**settings)


def test_ppo_has_no_budget_of_tokens(kit):
    with pytest.raises(ValueError, match="max_tokens_per_batch=99 is not supported"):
        kit.ppo_config(max_tokens_per_batch=99)


def test_data_sets_of_more_tokens_than_32_bits_count():
    longest = np.full(5000, 2**20)
    longest[::7] //= 3
    tokens = ExampleTokens(np.full(5000, 2), longest, 2 * longest, np.zeros(5000, np.int64))
    assert int(tokens.total.sum()) > 2**33
    for layout in ("padded", "packed", "shared"):
        batches = TokenBatches(tokens, 2**33, layout, seed=0, stride=2, num_processes=2)
        taken = np.concatenate(batches.epoch_batches(0))
        assert sorted(set(taken.tolist())) == list(range(5000))
        assert all(int(tokens.computed(layout)[batch].sum()) <= 2**33 for batch in batches.epoch_batches(0))
