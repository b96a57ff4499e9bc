"""`fastalign.patch`: log-probs of the model's own logits, in every family and wrapper, and no trace afterwards."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from fastalign.integrations import patch, unpatch

FAMILIES = [
    "llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "cohere", "granite", "phi_bias", "gpt2",
    "mixtral",
]  # fmt: skip


def completion_mask(batch):
    mask = batch["attention_mask"].bool().clone()
    mask[:, :3] = False
    return mask


def expected_logps(model, batch, temperature=1.0):
    """From the model's own logits, in float64: (B, T − 1) log-probs and entropies, 0 where not scored."""
    z = model(**batch).logits[:, :-1].double() / temperature
    log_p = z.log_softmax(-1)
    scored = completion_mask(batch)[:, 1:]
    logps = log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(scored, logps, 0.0), torch.where(scored, entropy, 0.0), scored


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_are_those_of_the_models_logits(zoo, family):
    model, batch = zoo.make(family), zoo.batch()
    logps, entropy, scored = expected_logps(model, batch, temperature=0.7)
    patch(model)
    out = model.logps(
        batch["input_ids"], completion_mask(batch), batch["attention_mask"], temperature=0.7, entropy=True, top1=True
    )
    assert out.logps.shape == (2, 6)
    assert out.mean_logits is None
    torch.testing.assert_close(out.logps.double(), logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    top1 = model(**batch).logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
    assert torch.equal(out.is_top1, top1 & scored)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "cohere", "phi_bias", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_through_logits(zoo, family, checkpointing):
    model, batch = zoo.make(family).train(), zoo.batch()
    if family == "gpt2":  # its dropout would differ from call to call
        model.eval()
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))
    (expected_logps(model, batch)[0] * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with patch(model):
        (
            model.logps(batch["input_ids"], completion_mask(batch), batch["attention_mask"]).logps * weights
        ).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_on_the_left(zoo):
    model, batch = zoo.make("llama"), zoo.batch()
    ids, mask = batch["input_ids"].roll(2, 1), batch["attention_mask"].roll(2, 1)
    ids[0], mask[0] = batch["input_ids"][0], 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    patch(model)
    right = model.logps(batch["input_ids"], completion_mask(batch)).logps[1, 2:4]  # no attention mask: nothing after it
    scored = torch.zeros_like(mask, dtype=torch.bool)
    scored[1, 5:] = True
    left = model.logps(ids, scored, mask, position_ids).logps[1]
    torch.testing.assert_close(left[4:], right, rtol=1e-5, atol=1e-6)
    assert not left[:4].any()


def test_rows_that_the_host_knows(zoo):
    model, batch = zoo.make("llama"), zoo.batch()
    patch(model)
    mask = completion_mask(batch)
    rows = mask[:, 1:].flatten().nonzero()[:, 0]
    expected = model.logps(batch["input_ids"], mask).logps
    assert torch.equal(model.logps(batch["input_ids"], mask, rows=rows).logps, expected)
    assert expected[mask[:, 1:]].all()


def test_every_mask_dtype_and_the_first_token(zoo):
    model, batch = zoo.make("llama"), zoo.batch()
    patch(model)
    everything = torch.ones_like(batch["input_ids"])
    full = model.logps(batch["input_ids"], everything).logps
    assert full.shape == (2, 6)
    assert full.all()
    assert torch.equal(model.logps(batch["input_ids"], everything.bool()).logps, full)
    assert model.logps(batch["input_ids"][:, :1], everything[:, :1]).logps.shape == (2, 0)


def test_handle_block_and_unpatch_leave_nothing(zoo):
    model = zoo.make("llama")
    before, signature = dict(model.__dict__), inspect.signature(model.forward)
    handle = patch(model)
    assert inspect.signature(model.forward) == signature
    assert inspect.signature(model.logps).parameters["completion_mask"]
    handle.remove()
    handle.remove()
    assert model.__dict__ == before
    with patch(model):
        assert model.__dict__ != before
    assert model.__dict__ == before
    patch(model)
    unpatch(model)
    unpatch(model)
    assert model.__dict__ == before
    assert model.forward.__func__ is tf.LlamaForCausalLM.forward
    assert not hasattr(model, "logps")


def test_an_inner_block_does_not_undo_an_outer_one(zoo):
    model = zoo.make("llama")
    patch(model)
    with patch(model):
        pass
    assert hasattr(model, "logps")
    unpatch(model)
    assert not hasattr(model, "logps")


def test_what_was_fused_stays_fused(zoo):
    from fastalign.models import fuse_head
    from fastalign.models.causal import is_fused

    model = fuse_head(zoo.make("llama"))
    with patch(model):
        pass
    assert is_fused(model)


def test_generation_saving_and_copies(zoo, tmp_path):
    model, batch = zoo.make("llama"), zoo.batch()
    ids = batch["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    patch(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(tf.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    mask = completion_mask(batch)
    torch.testing.assert_close(
        twin.logps(batch["input_ids"], mask).logps[mask[:, 1:]].exp(), torch.full((6,), 1 / zoo.V), rtol=1e-5, atol=0
    )
    unpatch(twin)
    assert hasattr(model, "logps")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "on the head"])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_lora(zoo, family, targets):
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=targets)
    model, batch = get_peft_model(zoo.make(family), config).eval(), zoo.batch()
    expected_logps(model, batch)[0].sin().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with patch(model):
        out = model.logps(batch["input_ids"], completion_mask(batch), batch["attention_mask"]).logps
        out.sin().sum().backward()
        torch.testing.assert_close(out.double(), expected_logps(model, batch)[0], rtol=1e-5, atol=1e-5)
        with model.disable_adapter(), torch.no_grad():  # the reference of a LoRA run
            reference = model.logps(batch["input_ids"], completion_mask(batch), batch["attention_mask"]).logps
            torch.testing.assert_close(reference.double(), expected_logps(model, batch)[0], rtol=1e-5, atol=1e-5)
    assert (reference - out).abs().max() > 1e-3
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert any("lm_head" in name for name in found) == ("lm_head" in targets)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_prompt_learning_shifts_nothing(zoo):
    torch.manual_seed(3)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch = get_peft_model(zoo.make("llama"), config).eval(), zoo.batch()
    log_p = model(**batch).logits[:, 3:-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    with patch(model):
        out = model.logps(batch["input_ids"], completion_mask(batch), batch["attention_mask"]).logps
    torch.testing.assert_close(out, torch.where(completion_mask(batch)[:, 1:], log_p, 0), rtol=1e-5, atol=1e-5)


def test_in_distributed_data_parallel(zoo, tmp_path):
    """Through the wrapper's own forward: its hooks see the step, and only then are gradients reduced."""
    model, batch = zoo.make("llama"), zoo.batch()
    expected_logps(model, batch)[0].sum().backward()
    expected = gradients(model)
    model.zero_grad()
    before = dict(model.__dict__)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        calls = []
        wrapped.register_comm_hook(None, lambda state, bucket: calls.append(1) or _reduced(bucket))
        with patch(wrapped):
            wrapped.logps(batch["input_ids"], completion_mask(batch), batch["attention_mask"]).logps.sum().backward()
            assert not hasattr(model, "logps")  # the model inside would bypass the wrapper
        assert calls
        assert not hasattr(wrapped, "logps")
        assert model.__dict__.keys() == before.keys()
    finally:
        torch.distributed.destroy_process_group()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_two_processes_reduce_their_gradients(zoo, launch, tmp_path):
    model, batch = zoo.make("llama"), zoo.batch()
    expected_logps(model, batch)[0].sum().backward()
    model.save_pretrained(tmp_path / "model")
    torch.save(batch | {"completion_mask": completion_mask(batch)}, tmp_path / "batch.pt")
    launch(Path(__file__).with_name("ddp_worker.py"), tmp_path)
    found = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():  # the wrapper averages over the two
        torch.testing.assert_close(found[name] * 2, parameter.grad, rtol=1e-4, atol=1e-5)


def _reduced(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_in_torch_compiles_wrapper(zoo):
    """No graph break, and one graph for all calls: what is scored is an input of it, not a part."""
    model, batch = zoo.make("llama"), zoo.batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    expected, _, _ = expected_logps(model, batch)
    torch._dynamo.utils.counters.clear()
    with patch(compiled):
        assert not hasattr(model, "logps")
        for mask in (completion_mask(batch), completion_mask(batch), completion_mask(batch).roll(1, 1)):
            out = compiled.logps(batch["input_ids"], mask, batch["attention_mask"]).logps
            if torch.equal(mask, completion_mask(batch)):
                torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not hasattr(compiled, "logps")
    assert model.forward.__func__ is tf.LlamaForCausalLM.forward


def test_autocast(zoo):
    model, batch = zoo.make("llama"), zoo.batch()
    patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.logps(batch["input_ids"], completion_mask(batch)).logps
        log_p = (
            model(**batch).logits[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.where(completion_mask(batch)[:, 1:], log_p, 0), rtol=0.02, atol=0.02)


def test_router_loss_comes_along(zoo):
    model, batch = zoo.make("mixtral"), zoo.batch()
    expected = model(**batch, output_router_logits=True).aux_loss
    with patch(model):
        out, aux_loss = model.logps(
            batch["input_ids"], completion_mask(batch), batch["attention_mask"], output_router_logits=True
        )
    torch.testing.assert_close(aux_loss, expected, rtol=0, atol=0)
    assert out.logps.shape == (2, 6)
