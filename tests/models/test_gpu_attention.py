"""Each kernel on a GPU: it is the one that is chosen, and packed and shared batches are what padded ones are."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastalign.data import PreferenceCollator
from fastalign.models import enable_segments, fuse_head, segment_kernels
from fastalign.models.layouts import plan_layout, run_layout
from fastalign.models.segment_attention import segment_attention
from fastalign.models.segment_kernels import KERNELS, Layer, choose, failure
from fastalign.models.varlen_attention import flash_packages

pytestmark = pytest.mark.gpu
# kernel, precision, and a model whose layers ask for what is special
CASES = {
    "flash": ("FlashAttention", torch.bfloat16, "llama"),
    "flash, window and softcap": ("FlashAttention", torch.bfloat16, "gemma2"),
    "varlen": ("torch's varlen_attn", torch.bfloat16, "llama"),
    "varlen, float16": ("torch's varlen_attn", torch.float16, "qwen3"),
    "varlen, window": ("torch's varlen_attn", torch.bfloat16, "mistral-window"),
    "flex": ("FlexAttention", torch.float32, "llama"),
    "flex, window": ("FlexAttention", torch.float32, "mistral-window"),
    "flex, window and softcap": ("FlexAttention", torch.float32, "gemma2"),
    "flex, bfloat16": ("FlexAttention", torch.bfloat16, "gemma2"),
    "a call a segment": (None, torch.float32, "qwen2-window"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def untold():
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def only(monkeypatch):
    """Leaves one kernel (or none) to choose from, and says whether it ran."""

    def leave(name):
        if name == "FlashAttention" and not flash_packages():
            pytest.skip("flash-attn is not installed")
        ran = []

        def run(flat, segments, layer):
            ran.append(layer)
            return KERNELS[name].run(flat, segments, layer)

        left = {} if name is None else {name: KERNELS[name]._replace(run=run)}
        monkeypatch.setattr(segment_kernels, "KERNELS", left)
        return ran

    return leave


def long_pairs(kit) -> list[dict]:
    """Over several blocks of FlexAttention."""
    examples = kit.pairs()
    for n, example in zip((300, 150, 40, 1), examples, strict=True):
        example["prompt_ids"] = [2 + i * 7 % 50 for i in range(n)]
    return examples


def model_of(kit, name, dtype):
    kind, config, extra = kit.MODELS[name]
    torch.manual_seed(0)
    # heads of 32, which every kernel takes, and room for the long prompts
    wide = {"hidden_size": 128, "max_position_embeddings": 512} | ({"head_dim": 32} if "head_dim" in extra else {})
    model = kind(config(**(kit.SIZES | extra | wide)))
    return fuse_head(model.to("cuda", dtype))


def outputs(model, batch, mode, weights):
    """Hidden states at the rows and the gradients of a sum of them, float32."""
    model.zero_grad()
    hidden = run_layout(model, batch, plan_layout(batch, mode), lambda hidden, head: hidden)
    (hidden.float() * weights).sum().backward()
    grads = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach().float()} | grads


@pytest.mark.parametrize("case", CASES)
def test_every_layout_is_the_padded_one(kit, only, case):
    """Output and gradients: within 1e-4 in float32, in 16 bits within twice the error of the padded batch."""
    name, dtype, family = CASES[case]
    ran = only(name)
    batch = PreferenceCollator(0)(long_pairs(kit))
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    weights = torch.randn(len(batch["rows"]), 128, generator=torch.Generator().manual_seed(0)).cuda()
    exact = outputs(model_of(kit, family, torch.float32), batch, "padded", weights)
    model = model_of(kit, family, dtype)
    padded = outputs(model, batch, "padded", weights)
    enable_segments(model)
    for mode in ("packed", "shared"):
        ran.clear()
        found = outputs(model, batch, mode, weights)
        assert bool(ran) == (name is not None)
        assert found.keys() == padded.keys()
        for key, value in found.items():
            scale = exact[key].abs().max().clamp(min=1e-3)
            error, own = ((x - exact[key]).abs().max() / scale for x in (value, padded[key]))
            assert error <= (1e-4 if dtype == torch.float32 else 2 * own + 1e-2), f"{mode}: {key}"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (12, 4)])
def test_a_kernel_proves_right(name, size, heads):
    """What `choose` relies on, for the shapes of models that are in use."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for asked in ({}, {"window": 50}, {"softcap": 30.0}, {"window": 50, "softcap": 30.0}):
            layer = Layer(torch.device("cuda", 0), dtype, *heads, size, size, **asked)
            if KERNELS[name].refuses(layer) is None:
                assert failure(KERNELS[name], layer) is None, layer


def test_what_is_chosen_by_default():
    layer = Layer(torch.device("cuda", 0), torch.bfloat16, 8, 4, 64, 64)
    assert choose(layer) == ("FlashAttention" if flash_packages() else "torch's varlen_attn")
    assert choose(layer._replace(dtype=torch.float32)) == "FlexAttention"
    assert choose(layer._replace(dtype=torch.float64)) is None


@pytest.mark.parametrize("kind", ["apart", "prefixed", "full and prefixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_between_segments(attend, kind, dtype):
    """Heads of 8, which FlexAttention refuses: float32 and float64 take a call a segment, bfloat16 torch's kernel."""
    inputs = tuple(x.detach().to("cuda", dtype).requires_grad_() for x in attend.tensors())
    segments = attend.make(kind)
    got = segment_attention(attend.Layer(), *inputs, segments, "sdpa", sdpa_attention_forward, scaling=8**-0.5)
    rounded = tuple(x.detach().double().cpu().requires_grad_() for x in inputs)
    wide = dtype != torch.bfloat16
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if wide else {"rtol": 3e-2, "atol": 3e-2}
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    expected = attend.by_definition(*rounded, segments)
    grads = torch.autograd.grad((got.cpu().double() * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), rounded)
    for ours, theirs in zip((got, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, **tolerance)
