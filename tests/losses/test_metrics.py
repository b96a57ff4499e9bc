import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fastalign.losses import (
    correlation_metrics,
    deviation_metrics,
    explained_variance_metrics,
    mean_metric,
    merge_metrics,
    ratio_metrics,
    summarize,
)


def test_mean_is_detached_and_keeps_the_dtype():
    values = torch.tensor([1.0, 4.0], dtype=torch.float64, requires_grad=True)
    metric = mean_metric(values * 2)
    assert (metric.total.item(), metric.weight.item()) == (10.0, 2.0)
    assert not metric.total.requires_grad
    assert metric.total.dtype == metric.weight.dtype == torch.float64
    assert metric.total.shape == metric.weight.shape == ()


@given(
    seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(lambda s: sum(s) > 2)
)
def test_correlation_of_the_parts_is_that_of_the_whole(seed, sizes):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=sum(sizes)) + 3
    y = 0.5 * x + rng.normal(size=sum(sizes))
    parts = [
        correlation_metrics("r", torch.from_numpy(a), torch.from_numpy(b))
        for a, b in zip(np.split(x, np.cumsum(sizes)[:-1]), np.split(y, np.cumsum(sizes)[:-1]), strict=True)
    ]
    values = summarize(merge_metrics(*parts))
    assert list(values) == ["r"]
    assert values["r"].item() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_correlation_in_float32_with_realistic_figures():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(-300, 300, (4096,), generator=generator).double()
    margins = 0.004 * lengths + torch.randn(4096, generator=generator, dtype=torch.float64)
    exact = np.corrcoef(margins, lengths)[0, 1]
    value = summarize(correlation_metrics("r", margins.float(), lengths.float()))["r"]
    assert value.item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_correlation_with_a_constant_is_nan(constant, dtype):
    varying = torch.linspace(-1, 1, 33, dtype=dtype)
    fixed = torch.full_like(varying, constant)
    assert summarize(correlation_metrics("r", varying, fixed))["r"].isnan()
    assert summarize(correlation_metrics("r", fixed, varying))["r"].isnan()


def test_perfect_correlation_stays_within_one():
    x = torch.linspace(0, 1, 7)
    values = summarize(correlation_metrics("up", x, 3 * x) | correlation_metrics("down", x, -0.1 * x))
    assert_close(values, {"up": torch.tensor(1.0), "down": torch.tensor(-1.0)})
    assert all(value.abs() <= 1 for value in values.values())


def test_merge_weighs_by_count_and_takes_names_missing_from_a_part():
    one = {"a": mean_metric(torch.tensor([1.0, 1.0, 4.0])), "b": mean_metric(torch.tensor([5.0]))}
    two = {"a": mean_metric(torch.tensor([10.0]))}
    values = summarize(merge_metrics(one, two))
    assert {name: value.item() for name, value in values.items()} == {"a": 4.0, "b": 5.0}


def test_summarize_of_nothing():
    assert summarize({}) == {}
    assert summarize(merge_metrics()) == {}


@given(
    seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(lambda s: sum(s) > 1)
)
def test_deviation_and_explained_variance_of_the_parts_are_those_of_the_whole(seed, sizes):
    rng = np.random.default_rng(seed)
    returns = rng.normal(size=sum(sizes)) + 1000
    values = returns + rng.normal(size=sum(sizes)) + 7
    cuts = np.cumsum(sizes)[:-1]
    parts = [
        deviation_metrics("s", torch.from_numpy(r))
        | explained_variance_metrics("e", torch.from_numpy(v), torch.from_numpy(r))
        for v, r in zip(np.split(values, cuts), np.split(returns, cuts), strict=True)
    ]
    found = summarize(merge_metrics(*parts))
    assert found.keys() == {"s", "e"}
    assert float(found["s"]) == pytest.approx(returns.std(), rel=1e-4)
    assert float(found["e"]) == pytest.approx(1 - (returns - values).var() / returns.var(), rel=1e-4, abs=1e-4)


def test_what_is_masked_does_not_count_and_a_constant_has_no_deviation():
    x, mask = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False])
    assert float(summarize(deviation_metrics("s", x, mask))["s"]) == 1.0
    assert float(summarize(deviation_metrics("s", torch.full((5,), 0.1)))["s"]) == 0.0
    assert summarize(deviation_metrics("s", x[:0]))["s"].isnan()
    values = torch.tensor([2.0, 4.0, 0.0])
    assert float(summarize(explained_variance_metrics("e", values, x, mask))["e"]) == pytest.approx(1.0)
    assert float(summarize(explained_variance_metrics("e", torch.zeros(3), x))["e"]) == pytest.approx(0.0)
    assert summarize(explained_variance_metrics("e", x, torch.full((3,), 0.1)))["e"].isnan()


@given(seed=st.integers(0, 1000), cut=st.integers(1, 11))
def test_a_ratio_and_its_standard_error(seed, cut):
    """Cochran's formula, from the whole or from parts."""
    rng = np.random.default_rng(seed)
    n = rng.integers(0, 7, 12).astype(float)
    n[0] = 1
    x = rng.binomial(n.astype(int), 0.6).astype(float)
    parts = [ratio_metrics("a", torch.from_numpy(x[i]), torch.from_numpy(n[i])) for i in (slice(cut), slice(cut, 12))]
    values = summarize(merge_metrics(*parts))
    assert list(values) == ["a", "a_se"]
    ratio = x.sum() / n.sum()
    assert values["a"].item() == pytest.approx(ratio)
    expected = np.sqrt(((x - ratio * n) ** 2).sum() * 12 / 11) / n.sum()
    assert values["a_se"].item() == pytest.approx(expected, abs=1e-9)


def test_the_standard_error_of_a_share_is_the_binomial_one():
    wins = torch.tensor([1.0, 0.0, 1.0, 1.0])
    values = summarize(ratio_metrics("a", wins, torch.ones(4)))
    assert values["a_se"].item() == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert summarize(ratio_metrics("a", wins[:1], torch.ones(1)))["a_se"].isnan()


def test_standard_errors_cover_as_often_as_they_say():
    """Comparisons in groups that differ: the interval of ±1.96 standard errors holds the truth in 95 % of cases."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        p = rng.beta(1, 1, 60)
        n = rng.integers(1, 8, 60)
        values = summarize(ratio_metrics("a", torch.from_numpy(rng.binomial(n, p).astype(float)), torch.from_numpy(n)))
        inside += abs(values["a"].item() - 0.5) < 1.96 * values["a_se"].item()
    assert inside / 2000 == pytest.approx(0.95, abs=0.025)
