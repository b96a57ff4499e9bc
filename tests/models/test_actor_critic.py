"""Policy and critic as one module: what its forward gives, where values are read, how a critic is made."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from fastalign.models import load_scalar_model
from fastalign.models.actor_critic import ActorCritic, scalar_model_from, whole_model
from fastalign.ops import linear_logps

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
ROWS = torch.tensor([1, 2, 3, 5, 6])  # the states before the tokens 2..4 and 1..2


def policy(seed=0, **sizes):
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**(SIZES | sizes))).eval()


def critic_of(model):
    critic = scalar_model_from(model)
    with torch.no_grad():
        critic.score.weight.normal_()
    return critic.eval()


def logps_of(hidden, head):
    targets = torch.full(IDS.shape, -100).flatten()
    targets[ROWS] = IDS.flatten()[ROWS + 1]
    return linear_logps(hidden, head.weight, targets.view(IDS.shape), rows=ROWS, **head.options).logps


@pytest.mark.parametrize("kind", ["critic", "head", "none"])
def test_forward(kind):
    model = policy()
    both = ActorCritic(model, critic_of(model) if kind == "critic" else None, value_head=kind == "head").eval()
    if kind == "head":
        torch.nn.init.normal_(both.value_head.weight)
    with torch.no_grad():
        out, values = both(IDS, head_fn=logps_of, rows=ROWS if kind != "none" else None)
        expected = model(IDS).logits.log_softmax(-1)
        expected = expected.gather(-1, IDS.roll(-1, 1)[..., None])[..., 0].flatten()[ROWS]
        torch.testing.assert_close(out.flatten()[ROWS], expected, rtol=1e-4, atol=1e-5)
        if kind == "critic":
            hidden = both.critic.model(IDS).last_hidden_state
            torch.testing.assert_close(values, both.critic.score(hidden).flatten()[ROWS])
        elif kind == "head":
            hidden = model.model(IDS).last_hidden_state
            torch.testing.assert_close(values, both.value_head(hidden).flatten()[ROWS])
        else:
            assert values is None
            assert not both.has_critic
            return
        assert values.dtype == torch.float32
        alone, again = both(IDS, rows=ROWS.numpy())  # values without the policy's head; rows as numpy
        assert alone is None
        assert torch.equal(again, values)
        assert both(IDS, head_fn=logps_of)[1] is None


def test_a_new_value_head_is_worth_nothing():
    both = ActorCritic(policy(), value_head=True)
    assert not both(IDS, rows=ROWS)[1].any()
    assert [p.shape for p in both.critic_parameters()] == [(1, 16), (1,)]
    with pytest.raises(ValueError, match="value_head=True stands in for a critic"):
        ActorCritic(policy(), critic_of(policy()), value_head=True)


def test_values_have_gradients_in_their_own_place():
    model = policy()
    both = ActorCritic(model, critic_of(model))
    both(IDS, rows=ROWS)[1].sum().backward()
    touched = {name.partition(".")[0] for name, p in both.named_parameters() if p.grad is not None}
    assert touched == {"critic"}
    assert set(map(id, both.critic_parameters())) == set(map(id, both.critic.parameters()))
    shared = ActorCritic(policy(), value_head=True)
    torch.nn.init.normal_(shared.value_head.weight)
    shared(IDS, rows=ROWS)[1].sum().backward()
    assert shared.policy.model.embed_tokens.weight.grad.any()  # the trunk is the policy's


def test_values_under_autocast_stay_in_float32():
    both = ActorCritic(policy(), value_head=True)
    torch.nn.init.normal_(both.value_head.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, values = both(IDS, rows=ROWS)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_an_adapter_on_the_head_leaves_the_values_alone():
    """LoRA on the head widens the hidden states that it sees; the value head reads the model's own."""
    model = get_peft_model(policy(), LoraConfig(r=4, target_modules=["lm_head"])).eval()
    torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    both = ActorCritic(model, value_head=True).eval()
    torch.nn.init.normal_(both.value_head.weight)
    with torch.no_grad():
        _, values = both(IDS, head_fn=logps_of, rows=ROWS)
        hidden = model.base_model.model.model(IDS).last_hidden_state
        torch.testing.assert_close(values, both.value_head(hidden).flatten()[ROWS])


def test_a_critic_from_a_policy_has_its_trunk(tmp_path):
    model = policy()
    critic = scalar_model_from(model)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(critic.model.state_dict()[name], tensor)
    assert critic.config.num_labels == 1
    assert critic.dtype == torch.float32
    torch.manual_seed(0)
    wide = scalar_model_from(policy(hidden_size=512, num_hidden_layers=1))
    assert float(wide.score.weight.std()) == pytest.approx(513**-0.5, rel=0.1)
    critic.save_pretrained(tmp_path)
    again = load_scalar_model(str(tmp_path))
    assert torch.equal(again.score.weight, critic.score.weight)
    critic.model.embed_tokens.weight.data.zero_()  # a copy
    assert model.model.embed_tokens.weight.any()


def test_a_critic_from_a_policy_with_an_adapter_has_the_bases_trunk():
    base = policy()
    expected = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    critic = scalar_model_from(get_peft_model(base, config))
    for name, tensor in expected.items():
        assert torch.equal(critic.model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in critic.parameters())


def test_a_policy_without_a_classifier_is_named():
    torch.manual_seed(0)
    config = tf.CodeGenConfig(vocab_size=31, n_embd=16, n_layer=1, n_head=4, rotary_dim=4, n_positions=32)
    with pytest.raises(ValueError, match="CodeGenForCausalLM has no sequence classifier"):
        scalar_model_from(tf.CodeGenForCausalLM(config))


def test_a_whole_model_has_its_adapter_merged():
    critic = critic_of(policy())
    assert whole_model(critic) is critic
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    adapted = get_peft_model(critic, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
        expected = adapted(IDS).logits
        merged = whole_model(adapted)
        assert isinstance(merged, tf.LlamaForSequenceClassification)
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_reaches_both():
    model = policy()
    both = ActorCritic(model, critic_of(model))
    both.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for part in (both.policy, both.critic):
        assert any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
