"""A tiny policy, its tokenizer and random tokenised pairs: trainers run on them in a second."""

from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastalign.rollouts import Completion, SamplingOptions
from fastalign.trainers import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    PROConfig,
    PROTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

torch.set_num_threads(1)
VOCAB = 61


def make_tokenizer() -> tf.PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}",
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def wished_token(completion_ids, **columns) -> list[float]:
    """A reward that is easily learnt: w5 is good, every token costs a little."""
    return [sum(token == 5 for token in ids) - 0.05 * len(ids) for ids in completion_ids]


class FixedAnswers:
    """A sampler whose completions follow from the prompts alone, so that it does not matter which process asks."""

    def __init__(self, response_length: int) -> None:
        self.options = SamplingOptions(max_new_tokens=response_length)

    def sync(self, model) -> None:
        pass

    def generate(self, prompts, *, num_samples=1, seed):
        found = []
        for prompt in prompts:
            for sample in range(num_samples):
                rng = np.random.default_rng([*prompt, sample])
                ids = rng.integers(3, 9, rng.integers(1, self.options.max_new_tokens)).tolist()
                finished = bool(rng.random() < 0.5)
                found.append(Completion([*ids, 1] if finished else ids, finished))
        return found


class Kit:
    """What the tests of this folder build with; everything is written below `folder`."""

    def __init__(self, folder: Path, tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    fixed_answers = FixedAnswers

    @staticmethod
    def model(seed: int = 0, kind=tf.LlamaForCausalLM, config=tf.LlamaConfig, **sizes):
        torch.manual_seed(seed)
        defaults = {
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.3,
            "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
        }  # fmt: skip
        return kind(config(**(defaults | sizes)))

    @classmethod
    def exact_model(cls, *args, **sizes):
        """In float64 throughout: transformers takes norms in float32, whatever the model is in."""
        model = cls.model(*args, **sizes).double()
        for norm in filter(lambda module: isinstance(module, LlamaRMSNorm), model.modules()):
            norm.forward = MethodType(lambda own, x: rms_norm(x, x.shape[-1:], own.weight, own.variance_epsilon), norm)
        return model

    @staticmethod
    def pairs(n: int, seed: int = 0, longest: int = 20) -> Dataset:
        rng = np.random.default_rng(seed)

        def ids() -> list[int]:
            return rng.integers(3, VOCAB, rng.integers(2, longest)).tolist()

        rows = [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids(), "row": i} for i in range(n)]
        return Dataset.from_list(rows)

    @staticmethod
    def labelled(n: int, seed: int = 0, longest: int = 16) -> Dataset:
        """Responses that are good or not, more of them good."""
        rng = np.random.default_rng(seed)

        def ids() -> list[int]:
            return rng.integers(3, VOCAB, rng.integers(2, longest)).tolist()

        rows = [{"prompt_ids": ids(), "completion_ids": ids(), "label": bool(rng.random() < 0.6)} for _ in range(n)]
        return Dataset.from_list([row | {"row": i} for i, row in enumerate(rows)])

    def config(self, **settings) -> DPOConfig:
        defaults = {
            "output_dir": str(self.folder / "out"), "cache_dir": str(self.folder / "cache"), "use_cpu": True,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "beta": 0.5,
            "gradient_checkpointing": False, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
            "per_device_train_batch_size": 4,
        }  # fmt: skip
        return DPOConfig(**(defaults | settings))

    def trainer(
        self, model, train, evaluation=None, *, ref_model=None, peft_config=None, callbacks=None, **settings
    ) -> DPOTrainer:
        return DPOTrainer(
            model,
            ref_model,
            self.config(**settings),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=self.tokenizer,
            peft_config=peft_config,
            callbacks=callbacks,
        )

    @staticmethod
    def prompts(n: int, seed: int = 0, longest: int = 8) -> Dataset:
        rng = np.random.default_rng(seed)
        ids = [rng.integers(3, VOCAB, rng.integers(2, longest)).tolist() for _ in range(n)]
        return Dataset.from_list([{"prompt_ids": x, "reference_answer": f"w{x[0]}"} for x in ids])

    def ppo_config(self, **settings) -> PPOConfig:
        """Three phases of eight completions, each gone over twice in two mini-batches."""
        defaults = {
            "output_dir": str(self.folder / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 3e-3,
            "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "num_mini_batches": 2,
            "num_ppo_epochs": 2, "response_length": 6,
        }  # fmt: skip
        if "total_episodes" not in settings:
            defaults["max_steps"] = 3
        return PPOConfig(**(defaults | settings))

    def ppo(self, model=None, reward=wished_token, train=None, evaluation=None, **settings) -> PPOTrainer:
        """A PPOTrainer; what its constructor takes beside a config may stand among the settings."""
        names = ("ref_model", "value_model", "callbacks", "optimizers", "peft_config", "sampler")
        given = {name: settings.pop(name) for name in (*names, "reward_processing_class") if name in settings}
        return PPOTrainer(
            self.ppo_config(**settings),
            self.tokenizer,
            self.model() if model is None else model,
            reward_model=reward,
            train_dataset=self.prompts(16) if train is None else train,
            eval_dataset=evaluation,
            **given,
        )

    @staticmethod
    def sequences(n: int, seed: int = 0, longest: int = 24) -> Dataset:
        """Random tokens to learn from; of each sequence some are trained on, the first never."""
        rng = np.random.default_rng(seed)
        rows = []
        for row in range(n):
            ids = rng.integers(3, VOCAB, rng.integers(3, longest)).tolist()
            mask = (rng.random(len(ids)) < 0.6).tolist()
            rows.append({"input_ids": ids, "completion_mask": [False, *mask[1:-1], True], "row": row})
        return Dataset.from_list(rows)

    def sft(self, model=None, train=None, evaluation=None, *, peft_config=None, **settings) -> SFTTrainer:
        defaults = {
            "output_dir": str(self.folder / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 0.1,
            "optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4,
        }  # fmt: skip
        return SFTTrainer(
            self.model() if model is None else model, SFTConfig(**(defaults | settings)),
            train_dataset=self.sequences(8) if train is None else train, eval_dataset=evaluation,
            processing_class=self.tokenizer, peft_config=peft_config,
        )  # fmt: skip

    @staticmethod
    def lists(n: int, seed: int = 0, longest: int = 12, scores: bool = False) -> Dataset:
        """Ranked lists of two to five random responses, with ties."""
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(n):
            k = int(rng.integers(2, 6))
            ids = [rng.integers(3, VOCAB, rng.integers(2, longest)).tolist() for _ in range(k + 1)]
            ranks = [1, 2, *rng.integers(1, 4, k - 2).tolist()]
            row = {"prompt_ids": ids[0], "response_ids": ids[1:], "ranks": [float(r) for r in ranks], "row": i}
            rows.append(row | ({"scores": [-0.5 * r for r in ranks]} if scores else {}))
        return Dataset.from_list(rows)

    def pro(
        self, model=None, train=None, evaluation=None, *, ref_model=None, peft_config=None, callbacks=None, **settings
    ) -> PROTrainer:
        defaults = {
            "output_dir": str(self.folder / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 0.1,
            "optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4,
        }  # fmt: skip
        if not settings.get("reference_free", True):
            defaults["cache_dir"] = str(self.folder / "cache")
        return PROTrainer(
            self.model() if model is None else model, ref_model, PROConfig(**(defaults | settings)),
            train_dataset=self.lists(8) if train is None else train, eval_dataset=evaluation,
            processing_class=self.tokenizer, peft_config=peft_config, callbacks=callbacks,
        )  # fmt: skip

    @staticmethod
    def messages(n: int) -> list[dict[str, str]]:
        """Rows of plain text whose words are single tokens."""
        return [{"prompt": f"w{3 + i} w9", "chosen": f" w{10 + i} w4", "rejected": f" w{20 + i}"} for i in range(n)]

    @staticmethod
    def reference_sums(dataset: Dataset) -> list[tuple[float, float]]:
        return [(float(e["ref_chosen_logps"].sum()), float(e["ref_rejected_logps"].sum())) for e in dataset]

    @staticmethod
    def tampered(trainer: DPOTrainer):
        """A look-up that is off by half a nat a token, as that of another model would be."""
        original = type(trainer.reference_cache).lookup
        return lambda self, sequences: [logps - 0.5 for logps in original(self, sequences)]

    @staticmethod
    def logs(trainer: DPOTrainer) -> list[dict[str, float]]:
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    @staticmethod
    def weights(trainer: DPOTrainer) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    @staticmethod
    def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance) -> None:
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def kit(tmp_path, tokenizer) -> Kit:
    return Kit(tmp_path, tokenizer)


class RewardKit:
    """Models, judgements and trainers; everything is written below `folder`."""

    def __init__(self, kit) -> None:
        self.kit, self.folder, self.tokenizer = kit, kit.folder, kit.tokenizer

    def model(self, exact: bool = False, **sizes):
        make = self.kit.exact_model if exact else self.kit.model
        return make(**({"kind": tf.LlamaForSequenceClassification, "num_labels": 1} | sizes))

    def config(self, **settings) -> RewardConfig:
        defaults = {
            "output_dir": str(self.folder / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False, "learning_rate": 0.1,
            "optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4,
        }  # fmt: skip
        return RewardConfig(**(defaults | settings))

    def trainer(self, model, train=None, evaluation=None, *, peft_config=None, reward_reference=None, **settings):
        return RewardTrainer(
            model, self.config(**settings), train_dataset=train, eval_dataset=evaluation,
            processing_class=self.tokenizer, peft_config=peft_config, reward_reference=reward_reference,
        )  # fmt: skip

    def pairs(self, n: int, seed: int = 0, margin: bool = False) -> Dataset:
        data = self.kit.pairs(n, seed)
        return data.add_column("margin", np.linspace(-1, 1, n)) if margin else data

    @staticmethod
    def lists(n: int, seed: int = 0) -> Dataset:
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(n):
            k = int(rng.integers(2, 6))
            responses = [rng.integers(3, 61, rng.integers(1, 9)).tolist() for _ in range(k)]
            row = {"prompt_ids": rng.integers(3, 61, 4).tolist(), "response_ids": responses}
            rows.append(row | {"ranks": [1, 2, *rng.integers(1, 4, k - 2).tolist()], "row": i})
        return Dataset.from_list(rows)

    @staticmethod
    def labels(n: int, seed: int = 0, binary: bool = False) -> Dataset:
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(n):
            row = {"prompt_ids": rng.integers(3, 61, 4).tolist(), "completion_ids": rng.integers(3, 61, 5).tolist()}
            rows.append(row | {"label": bool(i % 2) if binary else float(rng.normal()), "row": i})
        return Dataset.from_list(rows)

    def data(self, kind: str, n: int, seed: int = 0) -> Dataset:
        if kind in ("scalar", "binary"):
            return self.labels(n, seed, binary=kind == "binary")
        return self.lists(n, seed) if kind == "lists" else self.pairs(n, seed, margin=kind == "margins")


@pytest.fixture
def rewards(kit) -> RewardKit:
    return RewardKit(kit)
