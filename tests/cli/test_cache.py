"""`fastalign cache`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastalign.cli import main


@pytest.fixture
def cache(run_yaml, settings, capsys) -> Path:
    assert main(["cache", "build", "--config", str(run_yaml)]) == 0
    assert "0 rows found, 40 computed" in capsys.readouterr().out
    return Path(settings["cache_dir"])


def test_a_build_computes_what_dpo_looks_up_and_nothing_twice(cache, run_yaml, settings, capsys):
    assert not Path(settings["output_dir"]).exists()
    assert main(["cache", "build", "--config", str(run_yaml), "--beta", "0.7"]) == 0
    assert "40 rows found, 0 computed" in capsys.readouterr().out
    assert main(["dpo", "--config", str(run_yaml), "--length_alpha", "0.01"]) == 0
    assert "40 found, 0 computed" in capsys.readouterr().out


def test_inspect(cache, checkpoint, capsys):
    assert main(["cache", "inspect", "--cache_dir", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "rows" in out
    assert " 40 " in out


def test_verify_finds_a_changed_byte(cache, capsys):
    assert main(["cache", "verify", "--cache_dir", str(cache)]) == 0
    assert "no problems found" in capsys.readouterr().out
    shard = next((cache / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["cache", "verify", "--cache_dir", str(cache)]) == 1
    captured = capsys.readouterr()
    assert f"shards/{shard.name}" in captured.out
    assert captured.err.startswith("fastalign cache: failed: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "an action is needed: build, inspect, verify"),
        (["verfy"], "unknown action 'verfy' (did you mean verify?)"),
        (["inspect"], "cache inspect needs one folder: --cache_dir FOLDER"),
        (["inspect", "--cache_dri", "x"], "unknown flag --cache_dri (did you mean --cache_dir?)"),
        (["verify", "--cache_dir", "absent"], "absent is no reference cache"),
        (["build"], "model_name_or_path is missing"),
    ],
)
def test_bad_usage(argv, message, capsys):
    assert main(["cache", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
