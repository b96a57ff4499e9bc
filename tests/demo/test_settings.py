import subprocess
import sys
from dataclasses import fields

import pytest

from fastalign.demo.settings import DemoSettings


def test_every_setting_is_documented():
    assert all(spec.metadata["help"].endswith(".") for spec in fields(DemoSettings))


def test_length_alpha_stands_in_for_the_bias_unless_given():
    assert DemoSettings(length_bias=0.2).alpha == 0.2
    assert DemoSettings(length_bias=0.2, length_alpha=0.0).alpha == 0.0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta", 0.0),
        ("learning_rate", float("inf")),
        ("sft_learning_rate", -1e-3),
        ("length_bias", float("nan")),
        ("gold_weight", float("inf")),
        ("length_alpha", float("nan")),
        ("questions", 1),
        ("curve_points", 0),
        ("max_new_tokens", 0),
        ("batch_size", 6145),
    ],
)
def test_refuses_what_makes_no_sense(setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        DemoSettings(**{setting: value})


def test_imports_nothing_heavy():
    code = "import sys, fastalign.demo; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
