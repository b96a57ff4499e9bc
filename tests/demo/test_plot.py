import numpy as np
import pytest

from fastalign.demo.evaluation import Estimate
from fastalign.demo.plot import CurvePoint, can_plot, draw

pytestmark = pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed")

CURVES = {
    name: [
        CurvePoint(step, Estimate(0.1 * step, 0.05), Estimate(20.0 + gain * step, 1.0), Estimate(0.5 * step, 0.1))
        for step in range(4)
    ]
    for name, gain in (("DPO", 5), ("R-DPO", 0), ("PPO", 1))
}
LENGTHS = {
    "SFT": np.array([4, 8, 9]),
    "DPO": np.array([20, 40, 60]),
    "R-DPO": np.array([5, 5, 5]),
    "PPO": np.array([6, 7, 8]),
}


def test_draws_a_png_and_an_svg(tmp_path):
    svg = draw(CURVES, LENGTHS, CURVES["DPO"][0], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    for text in ("Mean answer length", "Gold reward", "Reward and KL", "tokens", "SFT", "R-DPO", "PPO"):
        assert text in svg


def test_the_same_figures_give_the_same_svg_and_no_settings_change(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    one, two = (draw(CURVES, LENGTHS, CURVES["DPO"][0], tmp_path / f"{i}.png") for i in range(2))
    assert one == two
    assert dict(matplotlib.rcParams) == before
