"""`linear_logps` with the vocabulary spread over processes, against the formula with all of it in float64."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastalign.ops.linear_logps import linear_logps, linear_logps_reference

N, H, V = 23, 16, 61
ALL = {"entropy": True, "top1": True, "log_sum_sq_probs": True, "mean_logits": True}
CASES = {  # dtype, scale of the logits, head, outputs, rows known or not
    "float64": (torch.float64, 1.0, {}, ALL, False),
    "float64, rows": (torch.float64, 1.0, {"temperature": 0.7, "logit_scale": 1.3}, ALL, True),
    "float64, softcap": (torch.float64, 1.0, {"softcap": 3.0}, ALL, False),
    "float64, peaked": (torch.float64, 12.0, {}, ALL, False),
    "float32": (torch.float32, 1.0, {}, {}, False),
    "float32, peaked": (torch.float32, 12.0, {}, {"entropy": True}, True),
    "bfloat16": (torch.bfloat16, 1.0, {}, {"entropy": True}, False),
}


def problem(dtype: torch.dtype, scale: float):
    """hidden, weight, bias, targets; the last two entries of the vocabulary are alike, so that a maximum is tied."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64) * scale
    weight, bias = torch.randn(V, H, generator=g, dtype=torch.float64) / 4, torch.randn(V, generator=g).double()
    weight[-1], bias[-1] = weight[7], bias[7]
    targets = torch.randint(V, (N,), generator=g)
    z = hidden @ weight.T + bias
    targets[2::3] = z[2::3].argmax(1)
    targets[:2] = torch.tensor([7, V - 1])
    hidden[:2] = weight[7] * 9  # whose largest logits are those two
    targets[4] = -100
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return *leaves, targets


def sent(out):
    """A scalar to which every output sends a different number."""
    g = torch.Generator().manual_seed(1)
    a, c, e = torch.randn(3, N, generator=g, dtype=torch.float64)
    total = (out.logps.double() * a).sum() + 0.5 * (out.lse.double() * c).sum()
    return total if out.entropy is None else total + 0.3 * (out.entropy.double() * e).sum()


def bounds(processes: int) -> list[int]:
    """Slices of different sizes."""
    return [0, *(V * (i + 1) // processes - (2 if i % 2 == 0 else -1) for i in range(processes - 1)), V]


def scored(group, dtype, scale, head, wanted, known):
    """Outputs and gradients of this process."""
    hidden, weight, bias, targets = problem(dtype, scale)
    ends = bounds(dist.get_world_size(group))
    part = slice(*ends[dist.get_rank(group) : dist.get_rank(group) + 2])
    own = [tensor.detach()[part].clone().requires_grad_() for tensor in (weight, bias)]
    rows = (targets != -100).nonzero()[:, 0] if known else None
    out = linear_logps(hidden, own[0], targets, bias=own[1], rows=rows, backend="torch", group=group, **head, **wanted)
    grads = torch.autograd.grad(sent(out), [hidden, *own])
    return [None if t is None else t.detach() for t in out], grads, part


def refused(group) -> str:
    hidden, weight, _, targets = problem(torch.float32, 1.0)
    targets[3] = V * 9
    try:
        linear_logps(hidden, weight, targets, group=group)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def results(request, launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    launch(Path(__file__).with_name("slices_worker.py"), folder, processes=request.param)
    return [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in range(request.param)]


def expected(dtype, scale, head, wanted):
    """Of the same numbers: outputs and gradients in float64, and those of plain torch in dtype."""
    tensors = problem(dtype, scale)
    found = []
    for kind in (torch.float64, dtype):
        leaves = [tensor.detach().to(kind).requires_grad_() for tensor in tensors[:3]]
        out = linear_logps_reference(leaves[0], leaves[1], tensors[3], bias=leaves[2], **head)
        out = out if wanted.get("entropy") else out._replace(entropy=None)
        found.append((out, torch.autograd.grad(sent(out), leaves)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_slices_give_what_the_whole_vocabulary_gives(results, name):
    dtype, scale, head, wanted, _ = CASES[name]
    (oracle, oracle_grads), (plain, plain_grads) = expected(dtype, scale, head, wanted)
    floor = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]

    def close(ours, exact, naive, what):
        allowed = 2 * (naive.double() - exact).abs().max() + floor * max(1.0, float(exact.abs().max()))
        assert (ours.double() - exact).abs().max() <= allowed, what

    for rank, of_process in enumerate(results):
        outputs, grads, part = of_process[name]
        for field, ours, exact, naive in zip(oracle._fields, outputs, oracle, plain, strict=True):
            if field == "is_top1":
                if wanted.get("top1"):
                    assert torch.equal(ours, exact)
            elif ours is not None:
                close(ours, exact.detach(), naive.detach(), field)
            assert (ours is not None) == (field in ("logps", "lse") or wanted.get(WANTS.get(field, field), False))
        close(grads[0], oracle_grads[0], plain_grads[0], "hidden")
        close(grads[1], oracle_grads[1][part], plain_grads[1][part], "weight")
        close(grads[2], oracle_grads[2][part], plain_grads[2][part], "bias")
        for ours, first in zip([*outputs, grads[0]], [*results[0][name][0], results[0][name][1][0]], strict=True):
            assert ours is None or torch.equal(ours, first), rank


WANTS = {"is_top1": "top1"}


def test_a_target_that_no_slice_has(results):
    assert all(f"target {V * 9} is out of range" in of_process["refused"] for of_process in results)
