"""Padded, packed, shared: one loss, one gradient, the same metrics, for every trainer and on real pairs."""

import logging
import math

import numpy as np
import pytest
import transformers as tf

from fastalign.trainers import DPOConfig, DPOTrainer
from fastalign.trainers.batches import computed_tokens, example_tokens, split_batch
from fastalign.trainers.layouts import TokenCounter, choose_layout, throughput

LAYOUTS = ("padded", "packed", "shared")
GRADIENTS = {"rtol": 1e-9, "atol": 1e-11}  # float64: what is left is the order of sums
COUNTS = {"padding_waste", "sharing_ratio", "tokens_per_second", "epoch", "learning_rate", "grad_norm"}


def step(kit, trainer):
    """Gradients and what was logged of one step of SGD with a learning rate of 1, and an evaluation after it."""
    before = kit.weights(trainer)
    trainer.train()
    gradients = {name: before[name] - after for name, after in kit.weights(trainer).items()}
    evaluated = trainer.evaluate() if trainer.eval_dataset is not None else {}
    logged = {name: value for name, value in kit.logs(trainer)[0].items() if name not in COUNTS}
    skipped = ("runtime", "per_second", "epoch")
    return gradients, logged | {n: v for n, v in evaluated.items() if not any(part in n for part in skipped)}


def assert_equal_steps(kit, make, **settings):
    steps = {}
    for layout in LAYOUTS:
        trainer = make(token_layout=layout, max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", **settings)
        assert trainer.token_layout == layout
        steps[layout] = step(kit, trainer)
        counts = {name: kit.logs(trainer)[0][name] for name in ("padding_waste", "sharing_ratio")}
        assert (counts["padding_waste"] > 0) == (layout == "padded")
    gradients, metrics = steps.pop("padded")
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for own, found in steps.values():
        kit.assert_same(own, gradients, **GRADIENTS)
        assert found.keys() == metrics.keys()
        for name, value in metrics.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    return counts["sharing_ratio"]  # of the last layout


DPO = {
    "sigmoid": {}, "ipo": {"loss_type": "ipo"}, "ld": {"ld_alpha": 0.5}, "wpo": {"use_weighting": True},
    "kto": {"loss_type": "kto"}, "bco": {"loss_type": "bco"}, "aot": {"loss_type": "aot"},
    "simpo": {"loss_type": "simpo"}, "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "live": {"precompute_ref_log_probs": False}, "cut": {"micro_batch_tokens": 60}, "lengths": {"length_alpha": 0.02},
    "checkpointing": {"gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("name", DPO)
def test_dpo(kit, name):
    unpaired = DPO[name].get("loss_type") in ("kto", "bco")
    data = [kit.labelled(n, n) if unpaired else kit.pairs(n, n) for n in (6, 5)]
    ref = kit.exact_model(seed=1) if name not in ("simpo",) else None
    settings = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 3} | DPO[name]
    assert_equal_steps(kit, lambda **s: kit.trainer(kit.exact_model(), *data, ref_model=ref, **s), **settings)


@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": 60}, {"loss_type": "bco", "bco_running_shift": True}])
def test_responses_to_one_prompt_share_it(kit, settings):
    """KTO and BCO on the two sides of pairs; KTO's mismatched responses too."""
    data = kit.pairs(6, longest=14), kit.pairs(5, seed=1, longest=14)
    settings = {"loss_type": "kto", "per_device_train_batch_size": 6, "per_device_eval_batch_size": 3} | settings
    settings |= {"train_sampling_strategy": "sequential"}
    assert LAYOUTS[-1] == "shared"
    ref = kit.exact_model(seed=1)
    ratio = assert_equal_steps(kit, lambda **s: kit.trainer(kit.exact_model(), *data, ref_model=ref, **s), **settings)
    assert ratio > 1.2


PRO = {"pro": {}, "reference": {"reference_free": False}, "infonce": {"loss_type": "infonce"}, "cut": {}}


@pytest.mark.parametrize("name", PRO)
def test_pro(kit, name):
    settings = {"per_device_train_batch_size": 6, "micro_batch_tokens": 150 if name == "cut" else 0} | PRO[name]
    data = kit.lists(6), kit.lists(5, seed=1)
    assert_equal_steps(kit, lambda **s: kit.pro(kit.exact_model(), *data, **s), **settings)


@pytest.mark.parametrize("packing", [False, True])
def test_sft(kit, packing):
    settings = {"per_device_train_batch_size": 6}
    if packing:  # rows of several sequences, which the packed layout puts end to end once more
        settings |= {"packing": True, "max_length": 64}
    data = kit.sequences(16), kit.sequences(6, seed=1)
    assert_equal_steps(kit, lambda **s: kit.sft(kit.exact_model(), *data, **s), **settings)


@pytest.mark.parametrize("kind", ["pairs", "margins", "lists", "scalar"])
def test_reward(kit, rewards, kind):
    data = rewards.data(kind, 6), rewards.data(kind, 5, seed=1)
    if kind == "scalar":  # all of one length, and padding is to be seen
        data = tuple(part.map(_shortened, with_indices=True) for part in data)
    for limit in (0, 60):
        make = lambda **s: rewards.trainer(rewards.model(exact=True), *data, **s)  # noqa: E731
        assert_equal_steps(kit, make, per_device_train_batch_size=6, micro_batch_tokens=limit)


def _shortened(example, index):
    return {"completion_ids": example["completion_ids"][: 1 + index % 4]}


PPO = {
    "critic": {}, "head": {"value_head": True},
    "grpo": {"loss_type": "grpo", "num_generations": 4}, "gspo": {"loss_type": "gspo", "num_generations": 4},
    "cut": {"loss_type": "grpo", "num_generations": 4, "micro_batch_tokens": 24},
    "penalty": {"policy_loss": "penalty", "kl_controller": "fixed"},
}  # fmt: skip


@pytest.mark.parametrize("name", PPO)
def test_ppo(kit, name):
    """One update of a phase whose completions are the same in all layouts."""
    settings = {
        "num_ppo_epochs": 1, "num_mini_batches": 1, "per_device_train_batch_size": 8, "max_steps": 1, "optim": "sgd",
        "learning_rate": 1.0, "max_grad_norm": 0.0, "kl_coef": 0.05,
    } | PPO[name]  # fmt: skip
    steps = {}
    for layout in LAYOUTS:
        trainer = kit.ppo(kit.exact_model(), sampler=kit.fixed_answers(6), token_layout=layout, seed=2, **settings)
        assert trainer.token_layout == layout
        before = kit.weights(trainer)
        trainer.train()
        gradients = {key: before[key] - after for key, after in kit.weights(trainer).items()}
        logs = next(entry for entry in trainer.state.log_history if "objective/kl" in entry)
        steps[layout] = gradients, logs
    gradients, metrics = steps["padded"]
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for layout in ("packed", "shared"):
        kit.assert_same(steps[layout][0], gradients, **GRADIENTS)
        for key, value in metrics.items():
            if key not in COUNTS | {"eps"}:
                assert steps[layout][1][key] == pytest.approx(value, rel=2e-5, abs=2e-6), key
    ratio = steps["shared"][1]["sharing_ratio"]
    assert ratio > 1.2 if "num_generations" in PPO[name] else ratio < 1.2  # one completion each: nothing to share


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_piece_has_whole_groups_and_counts_what_is_computed(kit, layout):
    trainer = kit.pro(kit.model(), kit.lists(12), per_device_train_batch_size=12, token_layout=layout)
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = example_tokens(batch, layout)
    for limit in (40, 100, 300):
        pieces = split_batch(batch, limit, layout=layout)
        sizes = [np.bincount(piece["groups"]).tolist() for piece in pieces]
        assert sorted(size for own in sizes for size in own) == sorted(np.bincount(batch["groups"]).tolist())
        for piece in pieces:
            assert computed_tokens(piece, layout) <= limit or len(np.unique(piece["groups"])) == 1
            assert piece["prefix_lengths"].shape == (piece["groups"].max() + 1,)
        computed = [computed_tokens(piece, layout) for piece in pieces]
        assert sum(computed) == tokens.sum()
        assert computed == sorted(computed, reverse=True)
        assert len(pieces) <= math.ceil(tokens.sum() / limit) * 2


def test_what_is_logged_of_tokens():
    counter = TokenCounter()
    counter.add(60, 100, 40)
    counter.add(60, 40, 0)
    found = throughput(counter.take(), 2.0)
    assert found == {"tokens_per_second": 60.0, "padding_waste": 40 / 140, "sharing_ratio": 1.2}
    assert throughput(counter.take(), None) == {}  # all of it was taken
    counter.add(30, 20, 0, seen=10)
    assert throughput(counter.take(), 2.0) == {"tokens_per_second": 5.0, "padding_waste": 0.0, "sharing_ratio": 1.5}


def test_ratios_are_those_of_the_batches(kit):
    trainer = kit.trainer(kit.model(), kit.pairs(8), max_steps=1, per_device_train_batch_size=8, token_layout="shared")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.train()
    log = kit.logs(trainer)[0]
    real = batch["lengths"].sum()
    computed = computed_tokens(batch, "shared") - 16  # the last token of each is not read
    assert log["num_tokens"] == real
    assert log["sharing_ratio"] == pytest.approx(real / computed, rel=0.02)
    assert log["sharing_ratio"] > 1.2


def test_real_pairs(shared_dir, tmp_path):
    """float32, prompts of a hundred and more tokens: loss, gradients and metrics to 1e-5."""
    folder = shared_dir / "models" / "hh-tiny"
    steps = {}
    for layout in LAYOUTS:
        args = DPOConfig(
            str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), use_cpu=True, report_to="none", max_steps=1,
            disable_tqdm=True, logging_steps=1, save_strategy="no", optim="sgd", max_grad_norm=0.0, max_length=400,
            learning_rate=1.0, lr_scheduler_type="constant", per_device_train_batch_size=6, token_layout=layout,
            gradient_checkpointing=False, max_samples=12, on_bad_row="skip", micro_batch_tokens=700, beta=0.5,
        )  # fmt: skip
        trainer = DPOTrainer(
            str(folder), str(shared_dir / "models" / "hh-tiny-dpo"), args,
            train_dataset=str(shared_dir / "data" / "hh_harmless.jsonl.gz"),
        )  # fmt: skip
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        gradients = {name: start[name] - p.detach() for name, p in trainer.model.named_parameters()}
        steps[layout] = gradients, trainer.state.log_history[0]
    gradients, metrics = steps["padded"]
    for layout in ("packed", "shared"):
        for name, expected in gradients.items():
            # the step is a difference of weights, which float32 holds to 6e-8 of themselves
            error = (steps[layout][0][name] - expected).double().norm()
            assert error <= 1e-5 * expected.double().norm() + 1e-7 * expected.numel() ** 0.5, name
        for name in metrics.keys() - COUNTS:
            assert steps[layout][1][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-5), name
        assert steps[layout][1]["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5)
    assert steps["shared"][1]["sharing_ratio"] > 1.3


# ---- which layout


def test_auto_shares_prompts(kit, caplog):
    with caplog.at_level(logging.INFO, logger="fastalign"):
        trainer = kit.trainer(kit.model(), kit.pairs(4))
    assert trainer.token_layout == "shared"
    assert "token layout: shared" in caplog.text


def test_auto_falls_back_and_says_why(kit, caplog):
    config = tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, eos_token_id=1, bos_token_id=None)

    class Odd(tf.GPT2LMHeadModel):  # does not attend through transformers' interface
        _supports_attention_backend = False

    with caplog.at_level(logging.INFO, logger="fastalign"):
        trainer = kit.trainer(Odd(config), kit.pairs(4))
    assert trainer.token_layout == "padded"
    assert "token layout: padded, because Odd" in caplog.text
    for layout in ("packed", "shared"):
        with pytest.raises(ValueError, match=f"token_layout='{layout}': Odd does not attend"):
            kit.trainer(Odd(config), kit.pairs(4), token_layout=layout)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fastalign"):
        assert kit.trainer(kit.model(), kit.pairs(4), pad_to_multiple_of=8).token_layout == "padded"
    assert "padded, because of pad_to_multiple_of=8" in caplog.text


def test_one_model_that_cannot_leaves_all_as_they_were(kit):
    from fastalign.models.attention import uses_segments

    class Odd(tf.LlamaForCausalLM):
        _supports_attention_backend = False

    models = [kit.model(), kit.model(kind=Odd)]
    assert choose_layout(models, kit.config()) == "padded"
    assert not any(uses_segments(model) for model in models)


def test_a_routers_loss_counts_every_token(kit):
    def mixture():
        return kit.model(kind=tf.MixtralForCausalLM, config=tf.MixtralConfig, num_local_experts=4)

    given = {"router_aux_loss_coef": 0.5, "per_device_train_batch_size": 4, "max_steps": 1, "micro_batch_tokens": 0}
    logs = []
    for layout in ("auto", "padded"):
        trainer = kit.trainer(mixture(), kit.pairs(4), token_layout=layout, **given)
        assert trainer.token_layout == {"auto": "packed"}.get(layout, layout)
        trainer.train()
        logs.append(kit.logs(trainer)[0])
    assert logs[0]["aux_loss"] == pytest.approx(logs[1]["aux_loss"], rel=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="token_layout='shared': the router's loss counts every token"):
        kit.trainer(mixture(), kit.pairs(4), token_layout="shared", **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_layout": "flat"}, "token_layout='flat': accepted are auto, padded, packed, shared"),
        ({"token_layout": "padded", "padding_free": True}, "padding_free=True with token_layout='padded'"),
        ({"token_layout": "packed", "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 with token_layout='packed'"),
    ],
)
def test_settings_that_exclude_each_other(kit, settings, message):
    with pytest.raises(ValueError, match=message):
        kit.config(**settings)


def test_padding_free_is_trls_name(kit):
    assert kit.config(padding_free=True).token_layout == "packed"
    assert kit.config(padding_free=True, token_layout="shared").token_layout == "shared"


def test_trpo_differentiates_twice(kit):
    settings = {"policy_loss": "trpo", "advantage_estimator": "rloo", "num_generations": 2, "num_ppo_epochs": 4}
    model = kit.model(attn_implementation="eager")
    assert kit.ppo(model, **settings).token_layout == "padded"
    with pytest.raises(ValueError, match="token_layout='shared': policy_loss='trpo'"):
        kit.ppo(model, token_layout="shared", **settings)
