"""Layouts of what is trained: checkpointing, adapters, autocast, scores, values, routers, and real pairs."""

from __future__ import annotations

import copy
import gzip
import json

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.data import CompletionCollator, PreferenceCollator, RewardCollator
from fastalign.models import enable_segments, fuse_head, fuse_scalar_head, load_causal_lm
from fastalign.models.actor_critic import ActorCritic
from fastalign.models.layouts import TOKEN_LAYOUTS, plan_layout, run_layout

torch.set_num_threads(1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_gradient_checkpointing(kit, name, reentrant):
    batch = PreferenceCollator(0)(kit.pairs())
    model = kit.make(name)
    own = kit.alone(model, batch)
    expected = own.detach(), kit.gradients(model, own)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for mode in TOKEN_LAYOUTS:
        kit.check_equal(model, batch, expected, mode, 1e-10)


def test_an_adapter_on_everything(kit):
    """The head too, which widens hidden states."""
    batch = PreferenceCollator(0)(kit.pairs())
    torch.manual_seed(0)
    kind, config, extra = kit.MODELS["llama"]
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(kit.in_own_dtype(kind(config(**(kit.SIZES | extra)))), lora).double()
    fuse_head(enable_segments(model))
    own = kit.alone(model, batch)
    expected = own.detach(), kit.gradients(model, own)
    for mode in TOKEN_LAYOUTS:
        kit.check_equal(model, batch, expected, mode, 1e-10)


def test_bfloat16_autocast(kit):
    batch = PreferenceCollator(0)(kit.pairs())
    model = kit.make("llama", torch.float32)
    exact = kit.alone(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [run_layout(model, batch, plan_layout(batch, mode), kit.logps_of(batch)) for mode in TOKEN_LAYOUTS]
        own = kit.alone(model, batch)
    allowed = 2 * float((own - exact).detach().abs().max()) + 1e-3
    for output in found:
        assert float((output - exact).detach().abs().max()) <= allowed


def test_in_training_only_what_is_needed_reaches_the_last_mlp(kit):
    batch = PreferenceCollator(0)(kit.pairs())
    model, sizes = kit.make("llama"), []
    model.model.layers[-1].mlp.gate_proj.register_forward_hook(lambda m, args, out: sizes.append(out.shape[1]))
    layout = plan_layout(batch, "shared")
    run_layout(model, batch, layout, kit.logps_of(batch))
    assert sizes == [len(np.unique(layout.rows))]
    assert sizes[0] < layout.computed
    copied = copy.deepcopy(model)
    torch.testing.assert_close(
        run_layout(copied, batch, layout, kit.logps_of(batch)), run_layout(model, batch, layout, kit.logps_of(batch))
    )


class NoSync(TorchDispatchMode):
    """Raises where values of a tensor would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma3"])
@pytest.mark.parametrize("mode", ["packed", "shared"])
def test_nothing_waits_for_the_device(kit, name, mode):
    batch = PreferenceCollator(0)(kit.pairs())
    model = kit.make(name)
    with NoSync():
        layout = plan_layout(batch, mode)
        run_layout(model, batch, layout, lambda hidden, head: hidden).sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(model.lm_head.weight.sum())


@pytest.mark.parametrize("collate", ["pairs", "lists"])
def test_scores_of_a_scalar_model(kit, collate):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**kit.SIZES, num_labels=1)
    model = fuse_scalar_head(enable_segments(tf.LlamaForSequenceClassification(config).double()))
    examples = kit.pairs()
    if collate == "lists":
        examples = [
            {
                "prompt_ids": e["prompt_ids"],
                "response_ids": [e["chosen_ids"], e["rejected_ids"], [9]],
                "ranks": [1, 2, 3],
            }
            for e in examples
        ]
    batch = RewardCollator(0)(examples)
    own = model(input_ids=batch["input_ids"], rows=batch["rows"])
    expected = own.detach(), kit.gradients(model, own)
    for mode in TOKEN_LAYOUTS:
        layout = plan_layout(batch, mode)
        scores = run_layout(model, batch, layout)
        torch.testing.assert_close(scores, expected[0], rtol=1e-6, atol=1e-6)  # they are float32
        for name, grad in kit.gradients(model, scores).items():
            torch.testing.assert_close(grad, expected[1][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["critic", "value head"])
def test_values_beside_log_probs(kit, kind):
    batch = PreferenceCollator(0)(kit.pairs())
    critic = tf.LlamaForSequenceClassification(tf.LlamaConfig(**kit.SIZES, num_labels=1)).double()
    policy = kit.make("llama")
    model = ActorCritic(policy, enable_segments(critic)) if kind == "critic" else ActorCritic(policy, value_head=True)
    if kind == "value head":
        torch.nn.init.normal_(model.value_head.weight)
    expected = model(input_ids=batch["input_ids"], head_fn=lambda hidden, head: hidden, rows=batch["rows"])
    for mode in TOKEN_LAYOUTS:
        hidden, values = run_layout(model, batch, plan_layout(batch, mode), lambda hidden, head: hidden, scores=True)
        torch.testing.assert_close(hidden, expected[0].flatten(0, 1)[torch.from_numpy(batch["rows"])])
        torch.testing.assert_close(values, expected[1])
        _, none = run_layout(model, batch, plan_layout(batch, mode), lambda hidden, head: hidden)
        assert none is None


@pytest.mark.parametrize("mode", TOKEN_LAYOUTS)
def test_rows_that_are_packed_already(kit, mode):
    examples = [
        {"input_ids": [4, 5, 6, 7, 8], "completion_mask": [False, True, False, True, True], "seq_lengths": [2, 3]},
        {"input_ids": [8, 9, 3], "completion_mask": [False, True, False], "seq_lengths": [3]},
    ]
    batch = CompletionCollator(0)(examples)
    model = kit.make("llama")
    parts = CompletionCollator(0)(
        [
            {"input_ids": ids, "completion_mask": mask}
            for ids, mask in (([4, 5], [0, 1]), ([6, 7, 8], [0, 1, 1]), ([8, 9, 3], [0, 1, 0]))
        ]
    )
    got = run_layout(model, batch, plan_layout(batch, mode), kit.logps_of(batch))
    torch.testing.assert_close(got, kit.alone(model, parts), rtol=1e-10, atol=1e-10)


def test_a_routers_loss_counts_every_token(kit):
    config = tf.MixtralConfig(**kit.SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=None)
    torch.manual_seed(0)
    model = fuse_head(enable_segments(tf.MixtralForCausalLM(config)))
    batch = PreferenceCollator(0)(kit.pairs())
    head_fn = kit.logps_of(batch)
    expected, aux = run_layout(model, batch, None, head_fn, output_router_logits=True)
    layout = plan_layout(batch, "packed", every_token=True)
    got, packed_aux = run_layout(model, batch, layout, head_fn, output_router_logits=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(packed_aux, aux)
    with pytest.raises(ValueError, match=r"counts every token and this layout computes 71 of 79"):
        run_layout(model, batch, plan_layout(batch, "packed"), head_fn, output_router_logits=True)


def test_a_batch_without_a_scored_row(kit):
    """Of a data set to learn from, one piece may hold no trained token: its gradients are zeros, and finite."""
    batch = CompletionCollator(0)([{"input_ids": [4, 5, 6], "completion_mask": [False] * 3}] * 2)
    model = kit.make("llama")
    for mode in TOKEN_LAYOUTS:
        model.zero_grad()
        hidden = run_layout(model, batch, plan_layout(batch, mode), lambda hidden, head: hidden)
        assert hidden.shape == (0, 32)
        hidden.sum().backward()
        grads = [p.grad for p in model.base_model.parameters()]
        assert all(grad is not None and not grad.any() for grad in grads)


def test_a_model_that_is_not_prepared_is_refused(kit):
    kind, config, extra = kit.MODELS["llama"]
    model = fuse_head(kind(config(**(kit.SIZES | extra))))
    batch = PreferenceCollator(0)(kit.pairs())
    with pytest.raises(ValueError, match="LlamaForCausalLM is not prepared for packed batches: enable_segments"):
        run_layout(model, batch, plan_layout(batch, "packed"), kit.logps_of(batch))


@pytest.fixture(scope="module")
def real_batch(shared_dir):
    tokenizer = tf.AutoTokenizer.from_pretrained(shared_dir / "models" / "hh-tiny")
    examples = []
    with gzip.open(shared_dir / "data" / "hh_harmless.jsonl.gz", "rt") as lines:
        for line in lines:
            row = json.loads(line)
            turns = [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
            if turns[0][0] != turns[1][0] or not turns[0][2].strip() or not turns[1][2].strip():
                continue
            prompt, *responses = (
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (turns[0][0], turns[0][2], turns[1][2])
            )
            if len(prompt) + max(map(len, responses)) < 256:
                examples.append(
                    {"prompt_ids": prompt, "chosen_ids": responses[0] + [4], "rejected_ids": responses[1] + [4]}
                )
            if len(examples) == 6:
                break
    return PreferenceCollator(1)(examples)


def test_real_pairs_in_float32(kit, shared_dir, real_batch):
    """1e-5 of a checkpoint's log-probs and gradients, and the tokens that it saves."""
    model = load_causal_lm(str(shared_dir / "models" / "hh-tiny"), dtype=torch.float32)
    fuse_head(enable_segments(model))
    output = run_layout(model, real_batch, None, kit.logps_of(real_batch))
    expected = output.detach(), kit.gradients(model, output)
    packed = kit.check_equal(model, real_batch, expected, "packed", 1e-5)
    shared = kit.check_equal(model, real_batch, expected, "shared", 1e-5)
    assert shared.computed < 0.75 * packed.computed < 0.75 * packed.real < 0.75 * packed.padded


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_real_pairs_on_a_gpu(kit, shared_dir, real_batch, attention):
    """bfloat16 within twice the error of the padded batch, torch's or FlashAttention's variable-length kernel."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    folder = str(shared_dir / "models" / "hh-tiny")
    exact = fuse_head(load_causal_lm(folder, dtype=torch.float32))
    with torch.no_grad():
        wanted = run_layout(exact, real_batch, None, kit.logps_of(real_batch))
        model = load_causal_lm(folder, dtype=torch.bfloat16, attn_implementation=attention).cuda()
        fuse_head(enable_segments(model))
        on_gpu = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in real_batch.items()}

        def error(mode):
            logps = run_layout(model, on_gpu, plan_layout(on_gpu, mode), lambda hidden, head: hidden)
            z = logps.float() @ model.lm_head.weight.float().T
            rows = torch.from_numpy(real_batch["rows"]).cuda()
            own = z.log_softmax(-1).gather(1, on_gpu["targets"].flatten()[rows][:, None])[:, 0]
            return float((own.cpu() - wanted).abs().mean())

        allowed = 2 * error("padded") + 1e-3
        assert error("packed") <= allowed
        assert error("shared") <= allowed
