"""Metrics add up over batches to those of the whole, in any split."""

import math

import numpy as np
import pytest
import torch

from fastalign.losses import dpo_metrics
from fastalign.trainers.meters import Meter, standard_errors
from fastalign.types import Metric


def metrics(rng, pairs):
    logps = [torch.from_numpy(rng.normal(-50, 5, pairs)) for _ in range(4)]
    lengths = [torch.from_numpy(rng.integers(5, 50, pairs)) for _ in range(2)]
    return logps, lengths


def of(logps, lengths, part=slice(None)):
    return dpo_metrics(
        *(x[part] for x in logps), chosen_lengths=lengths[0][part], rejected_lengths=lengths[1][part], beta=0.3
    )


def test_any_split_gives_the_values_of_the_whole():
    logps, lengths = metrics(np.random.default_rng(0), 20)
    whole, parts = Meter(), Meter()
    whole.update(of(logps, lengths))
    for part in (slice(0, 3), slice(3, 4), slice(4, 20)):
        parts.update(of(logps, lengths, part))
    expected, _ = whole.values()
    got, _ = parts.values()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_values_are_summed_over_processes_before_they_are_made():
    meter = Meter()
    meter.update({"a": Metric(torch.tensor(6.0), torch.tensor(2.0))})
    other = torch.tensor([[4.0], [3.0]], dtype=torch.float64)  # what a second process has
    values, _ = meter.values(lambda sums: sums + other)
    assert values == {"a": 2.0}


def test_batches_with_other_names_are_merged():
    meter = Meter()
    meter.update({"a": Metric(torch.tensor(1.0), torch.tensor(1.0)), "b": Metric(torch.tensor(5.0), torch.tensor(1.0))})
    meter.update({"a": Metric(torch.tensor(3.0), torch.tensor(1.0))})
    assert meter.values()[0] == {"a": 2.0, "b": 5.0}
    meter.clear()
    assert not meter
    assert meter.values()[0] == {}


def test_an_undefined_correlation_is_left_out_and_nan_is_not():
    logps, lengths = metrics(np.random.default_rng(3), 5)
    meter = Meter()
    meter.update(of(logps, [lengths[0], lengths[0]]))  # no difference of lengths to correlate with
    values, _ = meter.values()
    assert "length/margin_correlation" not in values
    meter.update({"loss": Metric(torch.tensor(float("nan")), torch.tensor(1.0))})
    assert math.isnan(meter.values()[0]["loss"])


def test_sums_do_not_round_in_float32():
    meter = Meter()
    for _ in range(300):
        meter.update({"a": Metric(torch.tensor(1e6 + 0.5), torch.tensor(1.0))})
    assert meter.values()[0]["a"] == 1e6 + 0.5


def test_standard_errors_are_those_of_the_sample():
    logps, lengths = metrics(np.random.default_rng(1), 40)
    meter = Meter()
    meter.update(of(logps, lengths))
    _, sums = meter.values()
    errors = standard_errors(sums)
    margins = 0.3 * ((logps[0] - logps[2]) - (logps[1] - logps[3])).numpy()
    wins = (margins > 0).astype(float)
    assert errors["rewards/margins_se"] == pytest.approx(margins.std(ddof=1) / math.sqrt(40))
    assert errors["rewards/accuracies_se"] == pytest.approx(wins.std(ddof=1) / math.sqrt(40))


def test_one_pair_has_no_standard_error():
    logps, lengths = metrics(np.random.default_rng(2), 1)
    meter = Meter()
    meter.update(of(logps, lengths))
    assert standard_errors(meter.values()[1]) == {}
