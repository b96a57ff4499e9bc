"""docs/schedules.md gives the planner's own figures."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("make_schedules", DOCS / "make_schedules.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def test_the_table_is_current():
    text = made.PAGE.read_text(encoding="utf-8")
    assert made.page(text) == text, "run: python docs/make_schedules.py"


def test_the_words_agree_with_the_table():
    """The costs of passes and sums, from the planner's device."""
    h200 = made.planned(8192, 4096, 4.4).time
    assert round(1e3 * h200.gemm) == 11
    from fastalign.ops.devices import DEVICES

    device, logits, weight = DEVICES["sm_90"], 8192 * made.VOCAB, 4096 * made.VOCAB
    times = [device.traffic(count) * 1e3 for count in (4 * logits, 6 * logits, 8 * weight, 6 * weight, 8 * 8192 * 4096)]
    assert [round(t, 2) for t in times] == [1.0, 1.5, 1.0, 0.75, 0.06]
    assert round(1e3 * device.keeping * logits, 1) == 0.1
