"""The grid of variants and options, made from DPO_LOSSES, and batches to try them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.losses import DPO_LOSSES, F_DIVERGENCES, dpo_loss

# option -> settings to try it with; every option of the table has its row
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "beta": [],  # in every test
    "loss_type": [],  # the grid itself
    "loss_weights": [],  # LISTS
    "label_smoothing": [{"label_smoothing": 0.1}],
    "length_alpha": [{"length_alpha": 0.03}],
    "f_divergence_type": [{"f_divergence_type": name} for name in F_DIVERGENCES if name != "reverse_kl"],
    "f_alpha_divergence_coef": [
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coef} for coef in (1.0, 1.3)
    ],
    "discopop_tau": [{"discopop_tau": 0.4}],
    "ld_alpha": [{"ld_alpha": 0.4}],
    "use_weighting": [{"use_weighting": True}],
    "simpo_gamma": [{"simpo_gamma": 1.4}],
    "cpo_alpha": [{"cpo_alpha": 0.3}],
    "desirable_weight": [{"desirable_weight": 1.3}],
    "undesirable_weight": [{"undesirable_weight": 0.7}],
}
LISTS: list[dict[str, Any]] = [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["hinge", "sft", "cpo"], "ld_alpha": 0.4, "use_weighting": True},
    {"loss_type": ["apo_zero", "exo_pair"], "label_smoothing": 0.01, "f_divergence_type": "js_divergence"},
    {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5]},
    {"loss_type": ["aot", "sigmoid"], "ld_alpha": 0.4},
]


QUICK = ("sigmoid", "discopop", "orpo", "aot")  # compiled in every run


def grid(rows: str) -> list[dict[str, Any]]:
    """Every variant on such rows, plain and with each option that it honours."""
    found = []
    for name, variant in DPO_LOSSES.items():
        if variant.rows != rows:
            continue
        plain = {"loss_type": name} | ({"label_smoothing": 0.01} if name == "exo_pair" else {})
        found.append(plain)
        found += [plain | setting for option in variant.options for setting in SETTINGS[option]]
        if variant.accepts_shift:
            found.append(plain | {"shift": 0.2})
    return found + (LISTS if rows == "pairs" else [])


def label(options: dict[str, Any]) -> str:
    name = options["loss_type"]
    head = name if isinstance(name, str) else "+".join(name)
    return "-".join([head, *(f"{key}_{value}" for key, value in options.items() if key not in ("loss_type",))])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `options`, `response_options` or `plain_options` run for the grid of pairs, that of single
    responses, and the variants on pairs without options; `compiled_options`: those too, but most of them are long."""
    plain = [
        options
        for options in grid("pairs")
        if options in LISTS or options.keys() - ({"label_smoothing"} if options["loss_type"] == "exo_pair" else set())
        == {"loss_type"}
    ]  # fmt: skip
    grids = {
        "options": grid("pairs"), "response_options": grid("responses"), "plain_options": plain,
        "compiled_options": plain,
    }  # fmt: skip
    for name, cases in grids.items():
        if name in metafunc.fixturenames:
            short = name != "compiled_options"
            marks = [[] if short or case["loss_type"] in QUICK or case in LISTS[:2] else [pytest.mark.long]
                     for case in cases]  # fmt: skip
            parameters = [pytest.param(case, id=label(case), marks=m) for case, m in zip(cases, marks, strict=True)]
            metafunc.parametrize(name, parameters)


@dataclass(frozen=True)
class Call:
    """A call of dpo_loss on some pairs: what it needs for its options, and nothing that it would refuse."""

    logps: list[Tensor]  # two, or with a reference four
    given: dict[str, Any]  # tensors per pair, or lists of them
    options: dict[str, Any]

    def __call__(self, fn: Callable[..., Any] = dpo_loss, **more: Any) -> Any:
        return fn(*self.logps, **(self.given | self.options | more))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Call:
        def apply(value: Any) -> Any:
            return [fn(item) for item in value] if isinstance(value, list) else fn(value)

        return replace(self, logps=apply(self.logps), given={key: apply(value) for key, value in self.given.items()})

    def requires_grad(self) -> Call:
        for values in self.logps:
            values.requires_grad_()
        return self

    @property
    def variants(self) -> list[Any]:
        name = self.options["loss_type"]
        return [DPO_LOSSES[one] for one in ([name] if isinstance(name, str) else name)]


@pytest.fixture(scope="session")
def make_call():
    """A function of options to a `Call` on random pairs."""

    def make(options, pairs=6, seed=0, dtype=torch.float64, scale=2.0):
        g = torch.Generator().manual_seed(seed)
        logps = [-40 + scale * torch.randn(pairs, generator=g, dtype=torch.float64) for _ in range(4)]
        lengths = [torch.randint(1, 30, (pairs,), generator=g) for _ in range(2)]
        longer = lengths[0] > lengths[1]
        tails = [0.3 * logps[i] * (longer if i % 2 == 0 else ~longer) for i in range(4)]
        weights = torch.rand(pairs, generator=g, dtype=torch.float64)
        options = dict(options)
        call = Call(logps, {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}, options)
        call = replace(call, logps=[values.to(dtype) for values in logps])
        if not any(variant.needs_reference for variant in call.variants):
            call = replace(call, logps=call.logps[:2])
        if options.get("ld_alpha") is not None:
            call.given["tail_logps"] = [tail.to(dtype) for tail in tails]
        if options.get("use_weighting"):
            call.given["weights"] = weights.to(dtype)
        return call

    return make


@pytest.fixture(scope="session")
def make_batch():
    """A function to four (P,) log-prob tensors and the lengths, as (positional arguments, keyword arguments)."""

    def make(pairs=6, seed=0, dtype=torch.float64, scale=8.0):
        generator = torch.Generator().manual_seed(seed)
        logps = [-40 + scale * torch.randn(pairs, generator=generator, dtype=dtype) for _ in range(4)]
        lengths = [torch.randint(1, 30, (pairs,), generator=generator) for _ in range(2)]
        return logps, {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}

    return make
