"""Scalar models: a new head's law, `rows` against plain transformers' own scores, what is refused."""

import copy
import logging

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fastalign.models import (
    fuse_scalar_head,
    load_causal_lm,
    load_scalar_adapter,
    load_scalar_model,
    scalar_head,
    unfuse_scalar_head,
)
from fastalign.models.scalar import is_scalar_fused

SIZES = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_labels": 1,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES)),
    "mistral": lambda: tf.MistralForSequenceClassification(tf.MistralConfig(**SIZES, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForSequenceClassification(tf.Qwen3Config(**SIZES)),
    "gemma2": lambda: tf.Gemma2ForSequenceClassification(tf.Gemma2Config(**SIZES)),
    "gemma3": lambda: tf.Gemma3TextForSequenceClassification(tf.Gemma3TextConfig(**SIZES)),
    "gpt2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(vocab_size=53, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=1, pad_token_id=0)
    ),
    "mixtral": lambda: tf.MixtralForSequenceClassification(
        tf.MixtralConfig(**SIZES, num_experts_per_tok=2, num_local_experts=4)
    ),
}


class Squashed(tf.LlamaForSequenceClassification):
    """More than a linear layer, which near zero looks like one."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 10 * torch.tanh(out.logits / 10)
        return out


def make(family: str):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def batch() -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Ids (3, 7) padded on the right with the pad token, lengths, and rows of the last tokens. One ends with EOS."""
    ids = torch.randint(3, 53, (3, 7), generator=torch.Generator().manual_seed(1))
    lengths = [7, 4, 1]
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    ids[1, 3] = 2
    return ids, lengths, torch.tensor([b * 7 + n - 1 for b, n in enumerate(lengths)])


@pytest.fixture
def causal(tmp_path) -> str:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_labels"}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).save_pretrained(tmp_path / "causal")
    return str(tmp_path / "causal")


# ---- loading


def test_new_head_is_normal_with_std_one_over_root_h_plus_1(causal):
    draws = [load_scalar_model(causal).score.weight.flatten() for _ in range(30)]
    std = float(torch.cat(draws).detach().std())
    assert abs(std * 33**0.5 - 1) < 0.06  # 960 draws: standard error 0.023
    tf.set_seed(5)
    first = load_scalar_model(causal)
    tf.set_seed(5)
    assert torch.equal(first.score.weight, load_scalar_model(causal).score.weight)
    seeded = [load_scalar_model(causal, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(seeded[0].score.weight, seeded[1].score.weight)
    assert first.config.num_labels == 1
    assert first.config.problem_type == "regression"
    own = load_causal_lm(causal)
    for name, parameter in own.model.named_parameters():
        assert torch.equal(parameter, first.model.get_parameter(name)), name


def test_a_checkpoint_keeps_its_head_and_loads_quietly(causal, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        first = load_scalar_model(causal)
    assert "no scalar head" in caplog.text
    assert "LOAD REPORT" not in caplog.text
    first.save_pretrained(tmp_path / "scalar")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = load_scalar_model(tmp_path / "scalar")
    assert torch.equal(first.score.weight, again.score.weight)
    assert "no scalar head" not in caplog.text
    assert load_scalar_model(str(tmp_path / "scalar"), dtype="bfloat16").score.weight.dtype == torch.bfloat16


def test_other_checkpoints_are_refused_by_name(causal, tmp_path):
    many = tf.AutoModelForSequenceClassification.from_pretrained(causal, num_labels=3)
    many.save_pretrained(tmp_path / "many")
    with pytest.raises(ValueError, match=r"score\.weight of shape \(3, 32\), a scalar model needs \(1, 32\)"):
        load_scalar_model(tmp_path / "many")
    model = load_scalar_model(causal)
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path / "holed", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of the backbone: model\.layers\.1\.mlp"):
        load_scalar_model(tmp_path / "holed")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no score or classifier"):
        scalar_head(load_causal_lm(causal))
    with pytest.raises(ValueError, match="has 3 outputs"):
        fuse_scalar_head(many)


# ---- rows


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_models_own_scores(family):
    model = make(family)
    ids, lengths, rows = batch()
    alone = torch.cat([model(input_ids=row[None, :n]).logits for row, n in zip(ids, lengths, strict=True)]).squeeze(-1)
    assert fuse_scalar_head(model) is model
    assert fuse_scalar_head(model) is model
    got = model(input_ids=ids, rows=rows)
    assert got.dtype == torch.float32
    assert got.shape == (3,)
    torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, model(input_ids=ids).logits.squeeze(-1), rtol=1e-5, atol=1e-5)  # without rows
    unfuse_scalar_head(model)
    assert not is_scalar_fused(model)
    assert "forward" not in model.__dict__


def test_any_rows_in_any_order_and_a_bias():
    model = make("llama")
    head = nn.Linear(32, 1)
    head.weight = model.score.weight
    model.score = head
    ids, _, _ = batch()
    hidden = model.model(ids).last_hidden_state
    every = model.score(hidden).flatten()
    fuse_scalar_head(model)
    rows = torch.tensor([20, 3, 3, 0])
    torch.testing.assert_close(model(input_ids=ids, rows=rows), every[rows], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(input_ids=ids, rows=rows.numpy()), every[rows], rtol=1e-6, atol=1e-6)
    assert float(head.bias) != 0
    for bad in ([21], [-1]):
        with pytest.raises(ValueError, match=r"rows from .* 0 … 20"):
            model(input_ids=ids, rows=torch.tensor(bad))
    with pytest.raises(ValueError, match="labels cannot be combined with rows"):
        model(input_ids=ids, rows=rows, labels=torch.zeros(3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_through_pooled_logits(checkpointing):
    model = make("llama").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, _, rows = batch()
    model(input_ids=ids).logits.sin().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fuse_scalar_head(model)(input_ids=ids, rows=rows).sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_frozen_backbone_runs_without_autograd():
    model = fuse_scalar_head(make("llama").train())
    model.model.requires_grad_(False)
    model.enable_input_require_grads()  # what checkpointing under an adapter does
    needed = []
    model.model.register_forward_hook(lambda m, a, out: needed.append(out.last_hidden_state.requires_grad))
    ids, _, rows = batch()
    model(input_ids=ids, rows=rows).sum().backward()
    assert needed == [False]
    assert model.score.weight.grad is not None


def test_precision_16_bit_trunk_float32_head_and_autocast():
    ids, _, rows = batch()
    exact = fuse_scalar_head(make("llama"))(input_ids=ids, rows=rows)
    narrow = make("llama").to(torch.bfloat16)
    got = fuse_scalar_head(narrow)(input_ids=ids, rows=rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0.1, atol=0.02)
    mixed = make("llama").to(torch.bfloat16)
    mixed.score.float()
    mixed.score.weight.data = make("llama").score.weight.data
    with torch.no_grad():
        hidden = mixed.model(ids).last_hidden_state.float().flatten(0, 1)[rows]
    expected = hidden @ mixed.score.weight[0]
    torch.testing.assert_close(fuse_scalar_head(mixed)(input_ids=ids, rows=rows), expected, rtol=1e-6, atol=1e-6)
    model = fuse_scalar_head(make("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(input_ids=ids, rows=rows)
        hidden = model.model(ids).last_hidden_state.float().flatten(0, 1)[rows]
    with torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(got, hidden @ model.score.weight[0], rtol=1e-5, atol=1e-6)  # the head is not rounded


# ---- refused


def test_what_is_not_one_linear_layer_on_causal_states_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="Squashed at the last tokens"):
        fuse_scalar_head(squashed := Squashed(tf.LlamaConfig(**SIZES)))
    assert not is_scalar_fused(squashed)
    assert "forward" not in squashed.__dict__
    bert = tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=53, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
            num_labels=1,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="BertForSequenceClassification"):
        fuse_scalar_head(bert)
    model = make("llama")
    model.score = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 1))
    with pytest.raises(ValueError, match=r"score of LlamaForSequenceClassification is a .*Sequential; it must be"):
        fuse_scalar_head(model)
    with pytest.raises(ValueError, match="sequence classifier"):
        fuse_scalar_head(nn.Linear(2, 1))
    with torch.device("meta"):
        meta = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="meta device"):
        fuse_scalar_head(meta)


# ---- adapters


def adapted(model, **options):
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], **options)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for _name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return peft


def test_adapter_the_trained_head_is_read_and_comes_back(causal, tmp_path):
    base = load_scalar_model(causal, generator=torch.Generator().manual_seed(0)).eval()
    original = copy.deepcopy(base)
    peft = adapted(base).eval()
    ids, _, rows = batch()
    expected = peft(input_ids=ids).logits.squeeze(-1)
    assert fuse_scalar_head(peft) is peft
    got = peft(input_ids=ids, rows=rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert scalar_head(peft).weight.requires_grad
    with peft.disable_adapter():
        torch.testing.assert_close(
            peft(input_ids=ids, rows=rows), original(input_ids=ids).logits.squeeze(-1), rtol=1e-5, atol=1e-5
        )
    got.sum().backward()
    assert scalar_head(peft).weight.grad is not None
    unfuse_scalar_head(peft)
    peft.save_pretrained(tmp_path / "adapter")
    base.config.pad_token_id = 7
    base.config.save_pretrained(tmp_path / "adapter")
    again = load_scalar_adapter(tmp_path / "adapter").eval()  # the base's head is another random one
    assert isinstance(again, PeftModel)
    assert again.get_base_model().config.pad_token_id == 7
    assert not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(fuse_scalar_head(again)(input_ids=ids, rows=rows), got, rtol=1e-5, atol=1e-5)


def test_adapter_on_the_head_is_refused(causal):
    config = LoraConfig(r=4, target_modules=["q_proj", "score"])
    peft = get_peft_model(load_scalar_model(causal), config)
    with pytest.raises(ValueError, match=r"score of LlamaForSequenceClassification is a peft.*target_modules"):
        fuse_scalar_head(peft)
