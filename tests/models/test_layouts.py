"""Padded, packed and shared: equal log-probs, scores and gradients, and no token computed for nothing."""

from __future__ import annotations

import copy
import functools
import json

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.data import CompletionCollator, ListCollator, PreferenceCollator, RewardCollator
from fastalign.models import enable_segments, fuse_head, fuse_scalar_head, load_causal_lm
from fastalign.models.actor_critic import ActorCritic
from fastalign.models.layouts import TOKEN_LAYOUTS, plan_layout, run_layout

torch.set_num_threads(1)
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
    "llama-tied": (tf.LlamaForCausalLM, tf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-eager": (tf.LlamaForCausalLM, tf.LlamaConfig, {"attn_implementation": "eager"}),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, {}),
    "qwen2-window": (tf.Qwen2ForCausalLM, tf.Qwen2Config,
                     {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {"head_dim": 8}),
    "mistral-window": (tf.MistralForCausalLM, tf.MistralConfig, {"sliding_window": 3, "head_dim": 8}),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config, {"head_dim": 8, "sliding_window": 4}),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4}),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}  # fmt: skip
IN_FLOAT32 = {"llama-eager", "gemma2"}  # their eager attention takes the softmax in float32


def in_own_dtype(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """transformers takes RMS norms in float32, whatever the model's dtype: not here, so that 1e-10 can be asked for."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)
    return model


def rms_norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    weight = module.weight + 1 if type(module).__name__.startswith("Gemma") else module.weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def make(name: str, dtype: torch.dtype = torch.float64) -> tf.PreTrainedModel:
    kind, config, extra = MODELS[name]
    torch.manual_seed(0)
    return fuse_head(enable_segments(in_own_dtype(kind(config(**(SIZES | extra))).to(dtype))))


def pairs() -> list[dict]:
    """Prompts of several lengths; completions that differ at once, later, or not at all, one of a single token."""
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(2, VOCAB, n).tolist() for n in (9, 1, 6, 5)]
    first, second, third = (numbers.integers(2, VOCAB, n).tolist() for n in (7, 4, 3))
    completions = [(first, second), (third, [7]), (first[:3] + second, first), (second, second)]
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, (chosen, rejected) in zip(prompts, completions, strict=True)
    ]


def logps_of(batch):
    """A head_fn: log-probs (n,) of the targets, plainly."""

    def head_fn(hidden, head):
        rows = torch.from_numpy(np.asarray(batch["rows"]))
        z = hidden.to(head.weight.dtype) @ head.weight.T * head.logit_scale
        z = z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
        return z.log_softmax(-1).gather(1, batch["targets"].flatten()[rows][:, None])[:, 0]

    return head_fn


def alone(model, batch) -> torch.Tensor:
    """The same from each sequence by itself, by the model's own logits."""
    found = []
    for ids, targets, length in zip(batch["input_ids"], batch["targets"], batch["lengths"], strict=True):
        logits = model(input_ids=ids[None, :length], use_cache=False).logits[0]
        own = targets[:length]
        found.append(logits.log_softmax(-1)[own >= 0].gather(1, own[own >= 0][:, None])[:, 0])
    return torch.cat(found)


def gradients(model, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(len(output), generator=torch.Generator().manual_seed(3)).to(output)
    (output * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, batch, expected, mode, tolerance, head_fn=None, **kwargs):
    """Output and gradients of a layout against `expected`, both of them."""
    layout = plan_layout(batch, mode)
    output = run_layout(model, batch, layout, head_fn or logps_of(batch), **kwargs)
    torch.testing.assert_close(output, expected[0], rtol=tolerance, atol=tolerance)
    got = gradients(model, output)
    assert got.keys() == expected[1].keys()
    for name, grad in expected[1].items():
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((got[name] - grad).abs().max()) <= 10 * tolerance * scale, name
    return layout


# What is planned ------------------------------------------------------------------------------------------------------


def test_tokens_of_a_shared_pair():
    examples = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [7, 9, 9, 1]}]
    batch = PreferenceCollator(0)(examples)
    layout = plan_layout(batch, "shared")
    ids = batch["input_ids"].flatten()[layout.tokens].tolist()
    # the last token of either is predicted and predicts nothing
    assert ids == [5, 6, 7, 8, 9, 9]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert layout.segments.lengths.tolist() == [3, 1, 2]
    assert layout.segments.prefixes.tolist() == [-1, 0, 0]
    assert layout.rows.tolist() == [1, 2, 3, 1, 2, 4, 5]
    assert layout.segments.needed.tolist() == [1, 2, 3, 4, 5]
    assert (layout.padded, layout.real, layout.computed) == (12, 11, 6)


def test_tokens_of_a_packed_pair():
    examples = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [7, 1]}]
    batch = PreferenceCollator(0)(examples)
    layout = plan_layout(batch, "packed")
    assert batch["input_ids"].flatten()[layout.tokens].tolist() == [5, 6, 7, 8, 5, 6, 7]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert layout.rows.tolist() == [1, 2, 3, 5, 6]
    whole = plan_layout(batch, "packed", every_token=True)
    assert batch["input_ids"].flatten()[whole.tokens].tolist() == [5, 6, 7, 8, 1, 5, 6, 7, 1]
    assert whole.segments.needed is None
    assert whole.computed == whole.real == 9


def test_padded_is_no_layout():
    assert plan_layout(PreferenceCollator(0)(pairs()), "padded") is None


def test_a_sequence_without_a_scored_row_keeps_one_token():
    batch = CompletionCollator(0)(
        [
            {"input_ids": [4, 5, 6], "completion_mask": [False, False, True]},
            {"input_ids": [7, 8, 9], "completion_mask": [False, False, False]},
        ]
    )
    layout = plan_layout(batch, "shared")
    assert batch["input_ids"].flatten()[layout.tokens].tolist() == [4, 5, 7]
    assert layout.rows.tolist() == [1]


def test_sequences_of_packed_rows_are_told_apart():
    batch = CompletionCollator(0)(
        [
            {"input_ids": [4, 5, 6, 7], "completion_mask": [False, True, False, True], "seq_lengths": [2, 2]},
            {"input_ids": [8, 9, 3], "completion_mask": [False, True, True], "seq_lengths": [3]},
        ]
    )
    layout = plan_layout(batch, "shared")
    assert batch["input_ids"].flatten()[layout.tokens].tolist() == [4, 6, 8, 9]
    assert layout.position_ids.tolist() == [0, 0, 0, 1]
    assert layout.segments.lengths.tolist() == [1, 1, 2]
    assert layout.rows.tolist() == [0, 1, 2, 3]


def test_tensors_are_made_once_for_a_device():
    layout = plan_layout(PreferenceCollator(0)(pairs()), "shared")
    assert layout.on(torch.device("cpu"))[0] is layout.on(torch.device("cpu"))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "flat"}, "token layout 'flat' is unknown; accepted are padded, packed, shared"),
        ({"prefix_lengths": np.array([1, 1])}, r"prefix_lengths has shape \(2,\), the batch has 4 groups"),
        ({"prefix_lengths": np.array([9, 1, 99, 5])}, "the prefix of group 2 has 99 tokens, its shortest sequence 13"),
        ({"prefix_lengths": np.array([9, -1, 6, 5])}, "the prefix of group 1 has -1 tokens"),
    ],
)
def test_what_cannot_be_planned(change, message):
    batch = PreferenceCollator(0)(pairs())
    mode = change.pop("mode", "shared")
    with pytest.raises(ValueError, match=message):
        plan_layout(batch | change, mode)


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_equals_sequences_alone(name):
    """float64, 1e-10."""
    batch = PreferenceCollator(0, pad_to_multiple_of=8)(pairs())
    model = make(name)
    own = alone(model, batch)
    expected = own.detach(), gradients(model, own)
    tolerance = 1e-5 if name in IN_FLOAT32 else 1e-10
    computed = [
        layout.computed for mode in TOKEN_LAYOUTS if (layout := check_equal(model, batch, expected, mode, tolerance))
    ]
    assert computed == [int(batch["lengths"].sum()) - 8, (9 + 6 + 3) + (1 + 2) + (9 + 3 + 3) + 8]


sizes = st.integers(1, 4)
token = st.integers(2, 4)  # few, so that responses begin alike


@st.composite
def lists(draw):
    examples = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(token, min_size=1, max_size=6))
        responses = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=4))
        if draw(st.booleans()):
            responses.append(responses[0])  # the same once more
        examples.append({"prompt_ids": prompt, "response_ids": responses, "ranks": list(range(len(responses)))})
    return examples


@pytest.fixture(scope="module")
def drawn_models():
    return {name: make(name) for name in ("llama", "qwen2-window")}


@settings(max_examples=25, deadline=None)
@given(examples=lists(), cut=st.integers(0, 3), name=st.sampled_from(["llama", "qwen2-window"]))
def test_any_lists(drawn_models, examples, cut, name):
    """Any group sizes, lengths and prefixes, prefixes of 0 and ones shorter than what is common too."""
    batch = ListCollator(0)(examples)
    batch["prefix_lengths"] = np.maximum(batch["prefix_lengths"] - cut, 0)
    model = drawn_models[name]
    own = alone(model, batch)
    expected = own.detach(), gradients(model, own)
    for mode in TOKEN_LAYOUTS:
        check_equal(model, batch, expected, mode, 1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_gradient_checkpointing(name, reentrant):
    batch = PreferenceCollator(0)(pairs())
    model = make(name)
    own = alone(model, batch)
    expected = own.detach(), gradients(model, own)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for mode in TOKEN_LAYOUTS:
        check_equal(model, batch, expected, mode, 1e-10)


def test_an_adapter_on_everything():
    """The head too, which widens hidden states."""
    batch = PreferenceCollator(0)(pairs())
    torch.manual_seed(0)
    kind, config, extra = MODELS["llama"]
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(in_own_dtype(kind(config(**(SIZES | extra)))), lora).double()
    fuse_head(enable_segments(model))
    own = alone(model, batch)
    expected = own.detach(), gradients(model, own)
    for mode in TOKEN_LAYOUTS:
        check_equal(model, batch, expected, mode, 1e-10)


def test_bfloat16_autocast():
    batch = PreferenceCollator(0)(pairs())
    model = make("llama", torch.float32)
    exact = alone(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [run_layout(model, batch, plan_layout(batch, mode), logps_of(batch)) for mode in TOKEN_LAYOUTS]
        own = alone(model, batch)
    allowed = 2 * float((own - exact).detach().abs().max()) + 1e-3
    for output in found:
        assert float((output - exact).detach().abs().max()) <= allowed


def test_in_training_only_what_is_needed_reaches_the_last_mlp():
    batch = PreferenceCollator(0)(pairs())
    model, sizes = make("llama"), []
    model.model.layers[-1].mlp.gate_proj.register_forward_hook(lambda m, args, out: sizes.append(out.shape[1]))
    layout = plan_layout(batch, "shared")
    run_layout(model, batch, layout, logps_of(batch))
    assert sizes == [len(np.unique(layout.rows))]
    assert sizes[0] < layout.computed
    copied = copy.deepcopy(model)
    torch.testing.assert_close(
        run_layout(copied, batch, layout, logps_of(batch)), run_layout(model, batch, layout, logps_of(batch))
    )


class NoSync(TorchDispatchMode):
    """Raises where values of a tensor would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma3"])
@pytest.mark.parametrize("mode", ["packed", "shared"])
def test_nothing_waits_for_the_device(name, mode):
    batch = PreferenceCollator(0)(pairs())
    model = make(name)
    with NoSync():
        layout = plan_layout(batch, mode)
        run_layout(model, batch, layout, lambda hidden, head: hidden).sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(model.lm_head.weight.sum())


@pytest.mark.parametrize("collate", ["pairs", "lists"])
def test_scores_of_a_scalar_model(collate):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, num_labels=1)
    model = fuse_scalar_head(enable_segments(tf.LlamaForSequenceClassification(config).double()))
    examples = pairs()
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
    expected = own.detach(), gradients(model, own)
    for mode in TOKEN_LAYOUTS:
        layout = plan_layout(batch, mode)
        scores = run_layout(model, batch, layout)
        torch.testing.assert_close(scores, expected[0], rtol=1e-6, atol=1e-6)  # they are float32
        for name, grad in gradients(model, scores).items():
            torch.testing.assert_close(grad, expected[1][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["critic", "value head"])
def test_values_beside_log_probs(kind):
    batch = PreferenceCollator(0)(pairs())
    critic = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES, num_labels=1)).double()
    policy = make("llama")
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
def test_rows_that_are_packed_already(mode):
    examples = [
        {"input_ids": [4, 5, 6, 7, 8], "completion_mask": [False, True, False, True, True], "seq_lengths": [2, 3]},
        {"input_ids": [8, 9, 3], "completion_mask": [False, True, False], "seq_lengths": [3]},
    ]
    batch = CompletionCollator(0)(examples)
    model = make("llama")
    parts = CompletionCollator(0)(
        [
            {"input_ids": ids, "completion_mask": mask}
            for ids, mask in (([4, 5], [0, 1]), ([6, 7, 8], [0, 1, 1]), ([8, 9, 3], [0, 1, 0]))
        ]
    )
    got = run_layout(model, batch, plan_layout(batch, mode), logps_of(batch))
    torch.testing.assert_close(got, alone(model, parts), rtol=1e-10, atol=1e-10)


def test_a_routers_loss_counts_every_token():
    config = tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=None)
    torch.manual_seed(0)
    model = fuse_head(enable_segments(tf.MixtralForCausalLM(config)))
    batch = PreferenceCollator(0)(pairs())
    head_fn = logps_of(batch)
    expected, aux = run_layout(model, batch, None, head_fn, output_router_logits=True)
    layout = plan_layout(batch, "packed", every_token=True)
    got, packed_aux = run_layout(model, batch, layout, head_fn, output_router_logits=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(packed_aux, aux)
    with pytest.raises(ValueError, match=r"counts every token and this layout computes 71 of 79"):
        run_layout(model, batch, plan_layout(batch, "packed"), head_fn, output_router_logits=True)


def test_a_model_that_is_not_prepared_is_refused():
    kind, config, extra = MODELS["llama"]
    model = fuse_head(kind(config(**(SIZES | extra))))
    batch = PreferenceCollator(0)(pairs())
    with pytest.raises(ValueError, match="LlamaForCausalLM is not prepared for packed batches: enable_segments"):
        run_layout(model, batch, plan_layout(batch, "packed"), logps_of(batch))


# Real pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_batch(shared_dir):
    import gzip

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


def test_real_pairs_in_float32(shared_dir, real_batch):
    """1e-5 of a checkpoint's log-probs and gradients, and the tokens that it saves."""
    model = load_causal_lm(str(shared_dir / "models" / "hh-tiny"), dtype=torch.float32)
    fuse_head(enable_segments(model))
    output = run_layout(model, real_batch, None, logps_of(real_batch))
    expected = output.detach(), gradients(model, output)
    packed = check_equal(model, real_batch, expected, "packed", 1e-5)
    shared = check_equal(model, real_batch, expected, "shared", 1e-5)
    assert shared.computed < 0.75 * packed.computed < 0.75 * packed.real < 0.75 * packed.padded


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_real_pairs_on_a_gpu(shared_dir, real_batch, attention):
    """bfloat16 within twice the error of the padded batch, torch's or FlashAttention's variable-length kernel."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    folder = str(shared_dir / "models" / "hh-tiny")
    exact = fuse_head(load_causal_lm(folder, dtype=torch.float32))
    with torch.no_grad():
        wanted = run_layout(exact, real_batch, None, logps_of(real_batch))
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
