"""linear_logps against the float64 formula: every backend, schedule, dtype and output; and its manners."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops import backends, linear_logps, linear_logps_reference
from fastalign.ops.linear_logps import linear_logps as op
from fastalign.ops.schedule import plan

BACKENDS = [n for n, why in backends.available().items() if why is None and (n != "triton" or backends.interpreting())]
HEADS = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scale": 1.3},
    "softcap": {"softcap": 8.0, "temperature": 0.9},
}


@pytest.mark.parametrize("peaked", [False, True], ids=["random", "peaked"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_output_and_gradient_is_within_the_rule(make_problem, within_rule, backend, dtype, head, peaked):
    problem = make_problem(dtype=dtype, peaked=peaked)
    options = {"entropy": True, "top1": True, "log_sum_sq_probs": True, "mean_logits": True, "backend": backend}
    ours = linear_logps(problem.hidden, problem.weight, problem.targets, bias=problem.bias, **HEADS[head], **options)
    reference = partial(linear_logps_reference, targets=problem.targets, **HEADS[head])
    exact_problem = problem.cast(torch.float64)
    exact = reference(exact_problem.hidden, exact_problem.weight, bias=exact_problem.bias)
    naive = reference(problem.hidden, problem.weight, bias=problem.bias)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs", "mean_logits"):
        assert getattr(ours, name).dtype == torch.float32
        within_rule(name, getattr(ours, name), getattr(naive, name), getattr(exact, name), dtype)
    assert (ours.logps <= 0).all()
    counts = problem.targets != -100
    if dtype == torch.float32:
        assert torch.equal(ours.is_top1[counts], exact.is_top1[counts])
    assert not ours.is_top1[~counts].any()
    grads = zip(
        ("hidden", "weight", "bias"), problem.gradients(ours), problem.gradients(naive),
        exact_problem.gradients(exact), strict=True,
    )  # fmt: skip
    for name, mine, theirs, true in grads:
        assert mine.dtype == dtype
        within_rule(f"grad_{name}", mine, theirs, true, dtype)


@pytest.mark.parametrize("workspace_mb", [0.02, 0.2, 16], ids=["tiny", "small", "ample"])
@pytest.mark.parametrize("rows", [False, True], ids=["found", "given"])
@pytest.mark.parametrize("schedule", ["deferred", "overlaid", "cached", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules_agree(make_problem, within_rule, backend, schedule, rows, workspace_mb, dtype):
    problem = make_problem(n=75, H=40, dtype=dtype)
    given_rows = (problem.targets != -100).nonzero()[:, 0] if rows else None
    call = partial(
        linear_logps, problem.hidden, problem.weight, problem.targets, bias=problem.bias, rows=given_rows,
        schedule=schedule, workspace_mb=workspace_mb, backend=backend,
    )  # fmt: skip
    if schedule == "cached" and workspace_mb == 0.02:
        with pytest.raises(ValueError, match="raise workspace_mb"):
            call()
        return
    exact_problem = problem.cast(torch.float64)
    exact = linear_logps_reference(exact_problem.hidden, exact_problem.weight, problem.targets, bias=exact_problem.bias)
    naive = linear_logps_reference(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
    ours = call()
    within_rule("logps", ours.logps, naive.logps, exact.logps, dtype)
    for mine, theirs, true in zip(
        problem.gradients(ours, entropy=False), problem.gradients(naive, entropy=False),
        exact_problem.gradients(exact, entropy=False), strict=True,
    ):  # fmt: skip
        within_rule("gradient", mine, theirs, true, dtype)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_needed_gradients(make_problem, needs, head, entropy):
    """Frozen head, frozen trunk and the rest, in float64: exact to rounding."""
    problem = make_problem(dtype=torch.float64, needs=needs)
    ours = linear_logps(
        problem.hidden, problem.weight, problem.targets, bias=problem.bias, entropy=entropy, **HEADS[head]
    )
    exact = linear_logps_reference(problem.hidden, problem.weight, problem.targets, bias=problem.bias, **HEADS[head])
    for mine, true in zip(
        problem.gradients(ours, entropy=entropy), problem.gradients(exact, entropy=entropy), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-11)


def test_needs_input_grad_of_the_backward_call(make_problem):
    """A backward that asks for hidden alone does not compute the others."""
    problem = make_problem()
    out = linear_logps(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
    (grad,) = torch.autograd.grad(out.logps.sum(), [problem.hidden], retain_graph=True)
    again = torch.autograd.grad(out.logps.sum(), problem.leaves)
    torch.testing.assert_close(grad, again[0])


@pytest.mark.parametrize("schedule", ["deferred", "overlaid", "cached", "frozen"])
def test_a_retained_graph_gives_the_same_gradient_twice(make_problem, schedule):
    needs = (True, schedule != "frozen", False)
    problem = make_problem(bias=False, needs=needs)
    out = linear_logps(problem.hidden, problem.weight, problem.targets, schedule=schedule, workspace_mb=16)
    first = torch.autograd.grad(out.logps.sum(), problem.leaves, retain_graph=True)
    second = torch.autograd.grad(out.logps.sum(), problem.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck(make_problem):
    problem = make_problem(n=5, H=3, V=7, dtype=torch.float64, ignored=0.3)

    def scalars(hidden, weight, bias):
        out = linear_logps(
            hidden, weight, problem.targets, bias=bias, entropy=True, softcap=3.0, temperature=0.8, backend="torch"
        )
        return out.logps, out.lse, out.entropy

    assert torch.autograd.gradcheck(scalars, problem.leaves)


@settings(max_examples=40)
@given(
    n=st.integers(0, 40), H=st.integers(1, 24), V=st.integers(1, 130), ignored=st.sampled_from([0.0, 0.5, 1.0]),
    workspace_kb=st.integers(4, 400), bias=st.booleans(), backend=st.sampled_from(BACKENDS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(n, H, V, ignored, workspace_kb, bias, backend, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=g, requires_grad=True)
    weight = torch.randn(V, H, generator=g, requires_grad=True)
    b = torch.randn(V, generator=g, requires_grad=True) if bias else None
    targets = torch.randint(0, V, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    out = linear_logps(hidden, weight, targets, bias=b, entropy=True, workspace_mb=workspace_kb / 1024, backend=backend)
    exact = linear_logps_reference(hidden.double(), weight.double(), targets, bias=None if b is None else b.double())
    leaves = [t for t in (hidden, weight, b) if t is not None]
    mine = torch.autograd.grad((out.logps + out.entropy - out.lse).sum(), leaves)
    true = torch.autograd.grad((exact.logps + exact.entropy - exact.lse).sum(), leaves)
    for ours, theirs in zip(
        (out.logps, out.lse, out.entropy, *mine), (exact.logps, exact.lse, exact.entropy, *true), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("ignored", [0.0, 1.0], ids=["empty", "all ignored"])
def test_nothing_to_score_gives_zeros_attached_to_the_graph(make_problem, ignored):
    problem = make_problem(n=0 if not ignored else 9, ignored=ignored)
    out = linear_logps(problem.hidden, problem.weight, problem.targets, bias=problem.bias, entropy=True, top1=True)
    assert out.logps.requires_grad
    assert not out.logps.any()
    for grad in torch.autograd.grad(out.logps.sum() + out.entropy.sum(), problem.leaves):
        assert not grad.any()


def test_shapes_and_strides_of_the_caller(make_problem):
    problem = make_problem(n=24, bias=False, ignored=0)
    flat = linear_logps(problem.hidden, problem.weight, problem.targets)
    strided = problem.hidden.detach().t().contiguous().t()
    column_major = problem.weight.detach().t().contiguous().t()
    assert not strided.is_contiguous()
    shaped = linear_logps(
        strided.view(24, 19)[:, :].reshape(2, 3, 4, 19), column_major, problem.targets.view(2, 3, 4), top1=True
    )
    assert shaped.logps.shape == shaped.is_top1.shape == (2, 3, 4)
    torch.testing.assert_close(shaped.logps.flatten(), flat.logps.detach())
    other = linear_logps(strided, column_major, problem.targets)
    torch.testing.assert_close(other.logps, flat.logps.detach())


def test_outputs_that_carry_no_gradient_say_so(make_problem):
    problem = make_problem()
    out = linear_logps(
        problem.hidden, problem.weight, problem.targets, top1=True, log_sum_sq_probs=True, mean_logits=True
    )
    assert out.logps.requires_grad
    assert not out.is_top1.requires_grad
    assert not out.log_sum_sq_probs.requires_grad
    assert not out.mean_logits.requires_grad


def test_under_no_grad_nothing_is_saved(make_problem):
    problem = make_problem()
    with torch.no_grad():
        out = linear_logps(problem.hidden, problem.weight, problem.targets)
    assert not out.logps.requires_grad


def test_autocast_rounds_as_linear_does_but_keeps_the_weight_gradient_in_float32(make_problem, backend):
    problem = make_problem(n=50, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_logps(problem.hidden, problem.weight, problem.targets, backend=backend, workspace_mb=0.05)
        grads = torch.autograd.grad(ours.logps.sum(), problem.leaves)
    rounded = problem.cast(torch.bfloat16).cast(torch.float64)
    exact = linear_logps_reference(rounded.hidden, rounded.weight, problem.targets)
    true = torch.autograd.grad(exact.logps.sum(), rounded.leaves)
    torch.testing.assert_close(ours.logps.double(), exact.logps, rtol=1e-5, atol=1e-5)
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    torch.testing.assert_close(grads[1].double(), true[1], rtol=1e-4, atol=1e-5)  # never rounded to 16 bits
    torch.testing.assert_close(grads[0].double(), true[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
def test_opcheck(make_problem, needs, rows):
    problem = make_problem(n=24, needs=needs)
    given_rows = (problem.targets != -100).nonzero()[:, 0] if rows else None
    schedule = "frozen" if needs == (True, False, False) else "deferred"
    args = (
        problem.hidden, problem.weight, problem.bias, problem.targets, given_rows, False, 1.0, 1.0, False, -100,
        [True, True, True, True, True], list(needs), "torch", schedule, 0, 2**20, "auto", None, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastalign.linear_logps, args)


@pytest.mark.parametrize("rows", [False, True])
def test_compiles_without_a_graph_break(make_problem, rows):
    problem = make_problem(n=24)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss(hidden, weight, bias, targets, given_rows):
        out = op(hidden, weight, targets, bias=bias, entropy=True, rows=given_rows)
        return (out.logps - 0.1 * out.entropy).sum()

    for n in (24, 20):  # a second length must not fail either
        targets = problem.targets[:n]
        given_rows = (targets != -100).nonzero()[:, 0] if rows else None
        compiled = loss(problem.hidden[:n], problem.weight, problem.bias, targets, given_rows)
        eager = op(problem.hidden[:n], problem.weight, targets, bias=problem.bias, entropy=True)
        expected = (eager.logps - 0.1 * eager.entropy).sum()
        torch.testing.assert_close(compiled, expected)
        for mine, theirs in zip(
            torch.autograd.grad(compiled, problem.leaves), torch.autograd.grad(expected, problem.leaves), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_result_does_not_depend_on_the_thread_count(make_problem):
    if "cpu" not in BACKENDS:
        pytest.skip("the C++ kernels are not built here")
    problem = make_problem(n=64, V=2000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear_logps(problem.hidden, problem.weight, problem.targets, backend="cpu").logps.detach())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)  # the GEMMs around may split differently


BAD = {
    "weight must be": {"weight": torch.randn(5)},
    "hidden must be": {"hidden": torch.randn(4, 7)},
    "targets must have hidden's leading shape": {"targets": torch.zeros(5, dtype=torch.int64)},
    "targets must be int64": {"targets": torch.zeros(4, dtype=torch.int32)},
    "bias must be": {"bias": torch.zeros(4)},
    "rows must be": {"rows": torch.zeros(4)},
    "give both in one dtype": {"weight": torch.randn(5, 3, dtype=torch.bfloat16)},
    "hidden must be float32": {"weight": torch.zeros(5, 3).int(), "hidden": torch.zeros(4, 3).int()},
    "temperature must be positive": {"temperature": 0.0},
    "softcap must be positive": {"softcap": -1.0},
    "backend must be one of": {"backend": "tpu"},
    "schedule must be one of": {"schedule": "lazy"},
    "needs a loss over groups": {"schedule": "streamed"},
    "workspace_mb must be a positive": {"workspace_mb": 0},
    r"targets\[2\] = 9 is out of range": {"targets": torch.tensor([0, 1, 9, 2])},
    r"rows must lie in": {"rows": torch.tensor([0, 11])},
    "float64 is for checking": {
        "hidden": torch.randn(4, 3).double(),
        "weight": torch.randn(5, 3).double(),
        "backend": BACKENDS[-1],
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    if message.startswith("float64") and BACKENDS == ["torch"]:
        pytest.skip("only the torch backend is usable here")
    arguments = {
        "hidden": torch.randn(4, 3, requires_grad=True), "weight": torch.randn(5, 3),
        "targets": torch.tensor([0, 1, 2, 3]),
    } | BAD[message]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_logps(**arguments)


def test_frozen_cannot_be_forced_on_a_head_that_learns():
    with pytest.raises(ValueError, match="schedule='frozen' needs a weight and bias without gradient"):
        plan(8, 4, 32, schedule="frozen")


def test_hidden_states_without_a_width_are_refused():
    with pytest.raises(ValueError, match=r"weight must be \(V, H\) with H ≥ 1, got shape \(0, 0\)"):
        linear_logps(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0).long())
