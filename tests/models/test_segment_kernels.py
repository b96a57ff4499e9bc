"""Which kernel a layer gets: the first that takes it and proves right, and what is said of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from fastalign.data import PreferenceCollator
from fastalign.models import flex_attention, segment_kernels, varlen_attention
from fastalign.models.layouts import plan_layout, run_layout
from fastalign.models.segment_attention import segment_attention
from fastalign.models.segment_kernels import KERNELS, Kernel, Layer, choose, layer_of, plainly
from fastalign.models.segments import Segments

torch.set_num_threads(1)
GPU = torch.device("cuda")
LAYER = Layer(GPU, torch.bfloat16, 8, 4, 64, 64)


@pytest.fixture(autouse=True)
def untold():
    """As in a new process, before and after."""
    for function in (choose, segment_kernels.tell):
        function.cache_clear()
    yield
    for function in (choose, segment_kernels.tell):
        function.cache_clear()


@pytest.fixture
def everything_works(monkeypatch):
    """A GPU with every package: what is tried proves right."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(varlen_attention, "flash_packages", lambda: ["flash_attention_2"])
    monkeypatch.setattr(segment_kernels, "failure", lambda kernel, layer: None)


WITH_FLASH = {
    "plain": ({}, "FlashAttention"), "softcap": ({"softcap": 50.0}, "FlashAttention"),
    "window": ({"window": 4096}, "FlashAttention"), "dropout": ({"dropout": 0.1}, "FlashAttention"),
    "float32": ({"dtype": torch.float32}, "FlexAttention"),
    "large heads": ({"size": 512, "value_size": 512}, "FlexAttention"),
    "values of another size": ({"size": 192}, "FlexAttention"),
}  # fmt: skip
WITHOUT = {
    "plain": ({}, "torch's varlen_attn"), "window": ({"window": 4096}, "torch's varlen_attn"),
    "softcap": ({"softcap": 50.0}, "FlexAttention"), "dropout": ({"dropout": 0.1}, None),
    "heads of 60": ({"size": 60, "value_size": 60}, "FlexAttention"),
    "float32": ({"dtype": torch.float32}, "FlexAttention"),
    "float32 and a window": ({"dtype": torch.float32, "window": 7}, "FlexAttention"),
    "float64": ({"dtype": torch.float64}, None),
    "heads of 8": ({"size": 8, "value_size": 8, "dtype": torch.float32}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITH_FLASH)
def test_the_order_with_flash_attention(everything_works, kind):
    change, name = WITH_FLASH[kind]
    assert choose(LAYER._replace(**change)) == name


@pytest.mark.parametrize("kind", WITHOUT)
def test_the_order_without_it(everything_works, monkeypatch, kind, caplog):
    """And the choice is said once, with why not another one."""
    monkeypatch.setattr(varlen_attention, "flash_packages", list)
    change, name = WITHOUT[kind]
    with caplog.at_level(logging.INFO, logger="fastalign"):
        for _ in range(2):
            assert choose(LAYER._replace(**change)) == name
    (record,) = caplog.records
    assert record.getMessage().startswith(f"attention of packed batches by {name or 'a call a segment'}")
    assert "not FlashAttention: it is not installed" in record.getMessage()


def test_other_torches_and_gpus(everything_works, monkeypatch):
    monkeypatch.setattr(varlen_attention, "flash_packages", list)
    monkeypatch.setattr(varlen_attention, "varlen_parameters", lambda: frozenset({"is_causal", "scale"}))
    assert choose(LAYER) == "FlexAttention"
    choose.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(segment_kernels, "failure", lambda kernel, layer: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose(LAYER) == "FlexAttention"


def raising(flat, segments, layer):
    raise RuntimeError("no kernel image is available for execution on the device")


def without_prefixes(flat, segments, layer):
    return plainly(flat, type(segments)(segments.lengths[None], segments.shape[1]), layer)


def upper_left(flat, segments, layer):
    return plainly([flat[0], flat[1].flip(0), flat[2]], segments, layer)


def without_a_gradient(flat, segments, layer):
    return plainly([flat[0], flat[1].detach() + 0 * flat[1], flat[2]], segments, layer)


WRONG = {
    "raising": (raising, "RuntimeError: no kernel image is available for execution on the device"),
    "without prefixes": (without_prefixes, "AssertionError: the output is off by"),
    "other keys": (upper_left, "AssertionError: the output is off by"),
    "no gradient": (without_a_gradient, "AssertionError: the gradient of the key is off by"),
    "nan": (lambda *given: plainly(*given) * float("nan"), "AssertionError: the output is off by nan"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WRONG)
def test_a_kernel_that_fails_its_trial_is_not_used(monkeypatch, caplog, kind, dtype):
    function, message = WRONG[kind]
    kernels = {name: Kernel(lambda layer: None, own) for name, own in (("one", function), ("two", plainly))}
    monkeypatch.setattr(segment_kernels, "KERNELS", kernels)
    layer = Layer(torch.device("cpu"), dtype, 4, 2, 16, 16, window=4096, softcap=5.0, dropout=0.1)
    with caplog.at_level(logging.INFO, logger="fastalign"), torch.no_grad():
        assert choose(layer) == "two"
    warning, told = caplog.records
    assert warning.levelname == "WARNING"
    assert "without one, whose trial failed" in warning.getMessage()
    assert message in warning.getMessage()
    assert told.getMessage().startswith("attention of packed batches by two")


def test_flex_attention_has_no_backward_on_a_cpu():
    """It is refused by name there; and where its kernel is asked all the same, the trial finds it out."""
    layer = Layer(torch.device("cpu"), torch.float32, 4, 2, 16, 16)
    assert KERNELS["FlexAttention"].refuses(layer) == "it has no backward on a CPU"
    assert segment_kernels.failure(KERNELS["FlexAttention"], layer).startswith("Unsupported: Observed exception")
    tensors = [torch.randn(5, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):  # that is what was observed
        flex_attention.attend(
            *tensors, Segments(np.array([[5]]), 5), window=None, softcap=None, scaling=None, compiled=False
        )


def test_a_window_that_no_segment_reaches_is_none(attend):
    segments = attend.make("full and prefixed")
    flat = [x.transpose(1, 2).flatten(0, 1) for x in attend.tensors()]
    assert layer_of(flat, segments, 13).window is None
    assert layer_of(flat, segments, 12).window == 12


# Where it is asked for ------------------------------------------------------------------------------------------------


@pytest.fixture
def on_any_device(monkeypatch):
    """The plain kernel takes every layer, on the CPU too; has the layers that it took."""
    taken = []

    def run(flat, segments, layer):
        taken.append(layer)
        positions = segments.varlen(flat[0].device).positions
        return plainly(flat if positions is None else [x[positions] for x in flat], segments, layer).to(flat[0].dtype)

    monkeypatch.setattr(segment_kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(segment_kernels, "KERNELS", {"plain": Kernel(lambda layer: None, run)})
    return taken


@pytest.mark.parametrize("kind", ["apart", "prefixed", "full and prefixed"])
@pytest.mark.parametrize("window", [None, 3])
def test_a_kernel_attends_for_sdpa(attend, on_any_device, kind, window):
    inputs, segments = attend.tensors(torch.float32), attend.make(kind)
    got = segment_attention(
        attend.Layer(), *inputs, segments, "sdpa", sdpa_attention_forward, sliding_window=window, scaling=8**-0.5
    )
    wanted = attend.by_definition(*inputs, segments, window=window)
    for mine, own in zip(attend.with_gradients(got, inputs), attend.with_gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5)
    assert on_any_device[-1] == Layer(
        torch.device("cpu"), torch.float32, 4, 2, 8, 8, window, scaling=8**-0.5
    )  # fmt: skip


def test_a_kernel_attends_for_eager_where_there_is_a_softcap(attend, on_any_device):
    """Which SDPA has not, so that the model uses the eager function by itself; else that was asked for by name."""
    inputs, segments = attend.tensors(torch.float32), attend.make("prefixed")
    given = (attend.Layer(), *inputs, segments, "eager", eager_attention_forward)
    segment_attention(*given, scaling=8**-0.5)
    assert not on_any_device
    got = segment_attention(*given, scaling=8**-0.5, softcap=0.5)
    assert on_any_device[-1].softcap == 0.5
    torch.testing.assert_close(got, attend.by_definition(*inputs, segments, softcap=0.5), rtol=1e-5, atol=1e-5)


def test_a_models_probe_asks_for_no_kernel(kit, on_any_device):
    """It may be in another precision than training, and would wait for a compiler in vain."""
    model = kit.make("llama", torch.float32)
    assert not on_any_device
    run_layout(model, batch := PreferenceCollator(0)(kit.pairs()), plan_layout(batch, "shared"), lambda hidden, head: 0)
    assert len({id(layer) for layer in on_any_device}) >= 2  # in each layer, and in trials


def test_what_no_kernel_knows_is_left_to_the_function(attend, on_any_device):
    inputs, segments = attend.tensors(torch.float32), attend.make("prefixed")

    def biased(module, query, key, value, mask, **kwargs):
        return query.transpose(1, 2), None

    segment_attention(attend.Layer(), *inputs, segments, "sdpa", biased, position_bias=torch.zeros(1))
    other = [inputs[0].double(), *inputs[1:]]
    with pytest.raises(RuntimeError, match="dtype"):  # as PyTorch says it
        segment_attention(attend.Layer(), *other, segments, "sdpa", sdpa_attention_forward)
    assert not on_any_device


def test_autocast_decides_on_the_precision(attend, on_any_device):
    """As for SDPA; a trial in the midst of a checkpointed layer in autocast is of neither."""
    inputs, segments = attend.tensors(torch.float32), attend.make("prefixed")
    mixed = (inputs[0], inputs[1], inputs[2].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = checkpoint(
            lambda *x: segment_attention(attend.Layer(), *x, segments, "sdpa", sdpa_attention_forward),
            *mixed, use_reentrant=False,
        )  # fmt: skip
    got.float().sum().backward()
    assert {layer.dtype for layer in on_any_device} == {torch.bfloat16}
    assert inputs[0].grad.dtype == torch.float32
    wanted = attend.by_definition(*(x.detach().bfloat16().float() for x in inputs), segments)
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


def test_a_call_a_segment_is_said_too(attend, caplog):
    inputs, segments = attend.tensors(), attend.make("prefixed")
    with caplog.at_level(logging.INFO, logger="fastalign"):
        for _ in range(2):
            segment_attention(attend.Layer(), *inputs, segments, "sdpa", sdpa_attention_forward)
    assert [record.getMessage() for record in caplog.records] == [
        "attention of packed batches by a call of sdpa a segment on cpu"
    ]
