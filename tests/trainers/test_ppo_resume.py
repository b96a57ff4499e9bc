"""A run that was killed and resumed is the uninterrupted one, to the bit on one CPU thread."""

import json
import random

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from fastalign.models.actor_critic import scalar_model_from

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.2, "task_type": "CAUSAL_LM"}
TIMES = {"eps", "tokens_per_second"}
VARIANTS = {
    "critic": {"critic_learning_rate": 0.01, "critic_warmup_steps": 2, "whiten_rewards": True},
    "value head": {"value_head": True, "vf_coef": 0.5},
    "adapter": {"lora": True, "learning_rate": 0.02},
    "adapters": {"lora": True, "critic_lora": True, "learning_rate": 0.02},
    "controllers": {
        "kl_controller": "adaptive", "target_kl": 0.5, "kl_horizon": 20, "normalize_scores": True, "score_clip": 2.0,
        "policy_loss": "penalty", "penalty_target": 0.002,
    },
    "group": {"advantage_estimator": "group", "num_generations": 2, "missing_eos_penalty": 0.5, "kl_loss_coef": 0.1},
}  # fmt: skip


def adapted_critic(kit):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    torch.manual_seed(5)
    return get_peft_model(scalar_model_from(kit.model(seed=2)), config)


def make(kit, *, lora=False, critic_lora=False, folder="out", **settings):
    if critic_lora:
        settings["value_model"] = adapted_critic(kit)
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"} | settings
    return kit.ppo(
        kit.model(initializer_range=0.05), train=kit.prompts(19), evaluation=kit.prompts(3, seed=3),
        peft_config=LoraConfig(**LORA) if lora else None, eval_strategy="steps", eval_steps=2,
        output_dir=str(kit.folder / folder), **settings,
    )  # fmt: skip


def history(trainer):
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    slow = [name for entry in entries for name in entry if "runtime" in name or "per_second" in name]
    return [{name: entry[name] for name in entry if name not in TIMES | set(slow)} for entry in entries]


def assert_equal(a, b, path="state"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_is_uninterrupted(kit, name):
    """Policy, critic, optimizer, scheduler, controllers, running statistics, log history and evaluations."""
    step = random.Random(name).randrange(1, 5)  # 19 prompts: it may lie in the second epoch
    whole = make(kit, **VARIANTS[name])
    whole.train()
    resumed = make(kit, folder="again", **VARIANTS[name])
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / f"checkpoint-{step}"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)
    assert history(resumed) == history(whole)
    assert_equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    assert resumed.run_state() == whole.run_state()
    if name == "adapters":
        assert list(resumed.actor_critic.policy.peft_config) == ["default"]  # the critic's is none of the policy's
        assert {n.split(".")[0] for n in kit.weights(resumed)} == {"policy", "critic"}
    assert resumed.run.episodes == (38 if name == "group" else 35)  # 19 prompts: the last phase of an epoch is smaller
    for file in ("fastalign_state.json", "trainer_state.json"):
        one, other = (json.loads((kit.folder / f / "checkpoint-5" / file).read_text()) for f in ("out", "again"))
        if file == "fastalign_state.json":
            assert one == other
        assert one.keys() == other.keys()
    if name == "controllers":
        state = whole.run_state()
        assert state["kl_controller"]["coef"] != 0.05
        assert state["penalty_controller"]["coef"] != 1.0
        assert state["moments"]["count"] == 35


@pytest.mark.parametrize("kind", ["neox", "tied"])
@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_checkpoints_with_other_names_than_the_models(kit, kind, method):
    """transformers saves GPT-NeoX's head under another name and tied heads not at all; both come back."""

    def one():
        if kind == "neox":
            sizes = {"kind": tf.GPTNeoXForCausalLM, "config": tf.GPTNeoXConfig}
        else:
            sizes = {"tie_word_embeddings": True}
        common = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        if method == "ppo":
            return kit.ppo(kit.model(**sizes), **common)
        return kit.trainer(kit.model(**sizes), kit.pairs(16), **common)

    whole, resumed = one(), one()
    whole.train()
    resumed.train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-1"))
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)


def test_what_a_checkpoint_holds(kit):
    """Policy as transformers saves it, critic in a folder of its own; both as they were."""
    trainer = make(kit, max_steps=1)
    trainer.train()
    folder = kit.folder / "out" / "checkpoint-1"
    policy, critic = load_file(folder / "model.safetensors"), load_file(folder / "critic" / "model.safetensors")
    state = trainer.actor_critic.state_dict()
    assert_equal(policy, {name: state[f"policy.{name}"] for name in policy})
    assert_equal(critic, {name: state[f"critic.{name}"] for name in critic})
    assert "score.weight" in critic
    assert {f.name for f in folder.iterdir()} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.json"}


def test_the_best_model_is_loaded_at_the_end(kit):
    """Policy and critic of the best evaluation, not those of the last step."""
    trainer = make(
        kit, load_best_model_at_end=True, metric_for_best_model="objective/scores", save_steps=2, max_steps=4
    )
    scores, evaluate = iter([2.0, 1.0]), trainer.evaluation_loop

    def evaluation_loop(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_objective/scores"] = next(scores)
        return output

    trainer.evaluation_loop = evaluation_loop
    trainer.train()
    assert trainer.state.best_global_step == 2
    folder = kit.folder / "out" / "checkpoint-2"
    state = trainer.actor_critic.state_dict()
    policy, critic = load_file(folder / "model.safetensors"), load_file(folder / "critic" / "model.safetensors")
    assert_equal(policy, {name: state[f"policy.{name}"] for name in policy})
    assert_equal(critic, {name: state[f"critic.{name}"] for name in critic})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kl_coef": 0.1}, "fixed coefficient 0.05, this controller 0.1"),
        ({"kl_controller": "adaptive", "target_kl": 1.0}, "that of 'FixedKLController', accepted is 'AdaptiveKLContr"),
        ({"policy_loss": "penalty"}, "that of 'FixedKLController', accepted is 'PenaltyController'"),
        ({"normalize_scores": True}, "normalize_scores=True, and the checkpoint is of a run with False"),
        ({"num_mini_batches": 4}, "of a run with 8 prompts a phase, over all processes; this one has 16"),
        ({"value_head": True}, "has a critic, and this run has none"),
        ({"advantage_estimator": "reinforce"}, "has a critic, and this run has none"),
        ({"ref_model": 7}, "trained against another reference"),
        ({"kl_coef": 0.0}, "trained against another reference"),
    ],
    ids=str,
)
def test_another_run_is_refused(kit, changed, message):
    make(kit, max_steps=1).train()
    changed = dict(changed)
    if "ref_model" in changed:
        changed["ref_model"] = kit.model(seed=7)
    with pytest.raises(ValueError, match=message):
        make(kit, **changed).train(resume_from_checkpoint=str(kit.folder / "out" / "checkpoint-1"))


def test_a_folder_that_is_no_checkpoint_is_refused(kit):
    make(kit, max_steps=1).train()
    folder = kit.folder / "out" / "checkpoint-1"
    (folder / "fastalign_state.json").unlink()
    with pytest.raises(ValueError, match=r"not a whole checkpoint: fastalign_state\.json is missing"):
        make(kit).train(resume_from_checkpoint=str(folder))
    (folder / "fastalign_manifest.json").unlink()  # as of another program
    with pytest.raises(ValueError, match=r"has no fastalign_state\.json"):
        make(kit).train(resume_from_checkpoint=str(folder))
