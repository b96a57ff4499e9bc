"""A base quantised to 4 bits under LoRA. What needs bitsandbytes skips where it is not installed."""

import types

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from fastalign.integrations import patch
from fastalign.models.quantised import allow_packing, check_unpacked, prevent_packing, unpacked

torch.set_num_threads(1)


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


class Layer(torch.nn.Linear):
    """What `prevent_packing` looks at, of bitsandbytes' Linear4bit."""

    def __init__(self, switch):
        super().__init__(2, 2)
        self.support_avx512bf16_for_cpu = switch


def test_the_switch_is_turned_off_where_it_was_on_and_comes_back():
    model = torch.nn.Sequential(Layer(True), torch.nn.Linear(2, 2), Layer(False))
    layers = prevent_packing(model)
    assert layers == [model[0]]
    assert not model[0].support_avx512bf16_for_cpu
    allow_packing(layers)
    assert [getattr(layer, "support_avx512bf16_for_cpu", None) for layer in model] == [True, None, False]
    with unpacked(model):
        assert not model[0].support_avx512bf16_for_cpu
    assert model[0].support_avx512bf16_for_cpu


def test_a_repacked_layer_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Layer(True))
    check_unpacked(model)
    model[1].weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match=r"^1 was repacked by bitsandbytes"):
        check_unpacked(model)


def quantised(zoo, folder, **settings):
    """A tiny model of whole blocks of 64 weights, saved and loaded in 4 bits."""
    torch.manual_seed(0)
    sizes = {**zoo.decoder, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(folder)
    config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def completion(batch):
    mask = batch["attention_mask"].bool().clone()
    mask[:, :3] = False
    return mask


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "on the head"])
def test_logps_and_gradients_are_those_of_the_logits(bnb, zoo, tmp_path, targets):
    base = quantised(zoo, tmp_path)
    assert isinstance(base.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert type(base.lm_head) is torch.nn.Linear
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=targets)
    model, batch = get_peft_model(base, config).train(), zoo.batch()
    log_p = model(**batch).logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = torch.where(completion(batch)[:, 1:], log_p, 0)
    expected.sin().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with patch(model):
        found = model.logps(batch["input_ids"], completion(batch), batch["attention_mask"]).logps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sin().sum().backward()
    assert all(gradient.any() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_a_quantised_head_is_refused_by_name(bnb, zoo, tmp_path):
    model = quantised(zoo, tmp_path)
    model.lm_head = bnb.nn.Linear4bit(64, zoo.V, bias=False, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is a bitsandbytes\S*Linear4bit.*keep the head out"):
        patch(model)


def test_evaluation_in_between_takes_no_gradients_away(bnb, zoo, tmp_path):
    """On some CPUs bitsandbytes repacks weights for inference, in a format without a backward."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model, batch = get_peft_model(quantised(zoo, tmp_path), config), zoo.batch()

    def gradients():
        model.train().zero_grad()
        model.logps(batch["input_ids"], completion(batch)).logps.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    patch(model)
    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-5, atol=1e-6)


def test_a_base_that_was_repacked_before_is_refused_by_name(bnb, zoo, tmp_path):
    model, batch = quantised(zoo, tmp_path), zoo.batch()
    with torch.no_grad():
        model.eval()(**batch)
    layer = model.model.layers[0].self_attn.q_proj
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so that bitsandbytes repacks nothing")
    patch(model)
    with torch.no_grad():
        assert model.logps(batch["input_ids"], completion(batch)).logps.any()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj was repacked by bitsandbytes"):
        model.logps(batch["input_ids"], completion(batch))


def test_the_switch_comes_back(bnb, zoo, tmp_path):
    model = quantised(zoo, tmp_path)
    layer = model.model.layers[0].self_attn.q_proj
    state, own = dict(layer.__dict__), dict(model.__dict__)
    with patch(model):
        assert not layer.support_avx512bf16_for_cpu
    assert layer.__dict__ == state
    assert model.__dict__.keys() == own.keys()
