"""`fastalign bench tune` on the command line: bad usage, no GPU, and what is printed and written with made-up times."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from fastalign import cli
from fastalign.ops import backends, tuning


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kernel", "gae"], "unknown flag --kernel (did you mean --kernels?)"),
        (["--kernels", "fused"], "--kernels: unknown 'fused'"),
        (["--kernels"], "--kernels takes one or more of fused_forward, row_kernels, live_matmul"),
        (["--dtypes", "float64"], "--dtypes: unknown 'float64' (did you mean float16?)"),
        (["--vocab", "0"], "--vocab takes a positive number, got '0'"),
        (["--output", "a", "b"], "--output takes one file, got a b"),
        (["--json", "x"], "--json takes no value"),
    ],
)
def test_bad_usage(argv, message, capsys):
    assert cli.main(["bench", "tune", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available() or backends.interpreting(), reason="kernels can run here")
def test_without_a_gpu(capsys):
    assert cli.main(["bench", "tune"]) == 1
    error = capsys.readouterr().err
    assert "on a CUDA or ROCm device with triton: no CUDA or ROCm device" in error
    assert "\n" not in error.strip()


@pytest.fixture
def made_up(monkeypatch):
    """Two subjects, one of which gets faster; a device that is said to be there."""
    monkeypatch.setattr(backends, "available", lambda: {"triton": None})

    def subjects(device, shape, dtype, kernels):
        from fastalign.kernels._tiles import RowTiles

        assert (shape.n, shape.hidden_size, shape.vocab) == (7, 4096, 300)
        for case in ("quick", "slow"):
            yield tuning.Subject(kernels[0], case, RowTiles(64, 4), (RowTiles(128, 4),), lambda tiles: torch.ones(1))

    monkeypatch.setattr(tuning, "subjects", subjects)

    def timer_for(device):
        seconds = iter([1.0, 0.5, 1.0, 1.0])
        return lambda launch: next(seconds)

    monkeypatch.setattr(tuning, "timer_for", timer_for)


def test_what_changed_is_printed_and_written(made_up, tmp_path, capsys):
    path = tmp_path / "table.json"
    argv = ["bench", "tune", "--kernels", "row_kernels", "--tokens", "7", "--vocab", "300", "--output", str(path)]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "row_kernels, quick: 1000.000 ms -> 500.000 ms with block 64 -> 128 (2 sizes)",
        "row_kernels, slow: 1000.000 ms, unchanged (2 sizes)",
        f"written to {path}",
    ]
    table = json.loads(path.read_text())
    assert table["row_kernels"]["quick"] == {"block": 128, "num_warps": 4}
    assert "7 x 4096 x 300" in table["about"]
    assert cli.main([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["table"] == str(path)
    assert facts["subjects"][0]["changes"] == {"block": [64, 128]}


@pytest.mark.usefixtures("made_up")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_interpreted_times_are_not_kept(capsys):
    assert cli.main(["bench", "tune", "--tokens", "7", "--vocab", "300"]) == 2
    assert "kernels are interpreted here" in capsys.readouterr().err
