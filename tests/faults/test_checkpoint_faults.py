"""A checkpoint of a run, damaged anywhere: found, named, and passed over for the one before it."""

from __future__ import annotations

import runpy
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.trainers.checkpoint_files import CheckpointError, check, newest_whole


@pytest.fixture(scope="session")
def saved(forks, tmp_path_factory) -> Path:
    """What a run leaves that has saved twice."""
    folder = tmp_path_factory.mktemp("saved")
    names = {"output_dir": str(folder / "out"), "max_steps": 2, "resume": False, "loader_workers": 0}
    names |= {"errors_path": str(folder / "errors"), "result_path": str(folder / "result.safetensors")}
    worker = str(Path(__file__).with_name("checkpoint_worker.py"))
    process = forks.Process(target=runpy.run_path, args=(worker,), kwargs={"init_globals": names})
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "errors").read_text()[-3000:]
    return folder / "out"


@settings(max_examples=40)
@given(data=st.data())
def test_damage_is_found_and_named(saved, tally, data):
    damage(saved, tally, data)


@pytest.mark.long
@settings(max_examples=2000)
@given(data=st.data())
def test_a_thousand_damages_are_found_and_named(saved, tally, data):
    damage(saved, tally, data)


def damage(saved: Path, tally, data) -> None:
    """A bit flips, a file is cut short, grows, or is gone."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "out"
        shutil.copytree(saved, root)
        last = root / "checkpoint-2"
        path = data.draw(st.sampled_from(sorted(file for file in last.rglob("*") if file.is_file())))
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "grow", "gone"]))
        if kind == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:
            content += b"x"
        path.unlink() if kind == "gone" else path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            check(last)
        assert path.name in str(caught.value)
        found, warnings = newest_whole(root)
        assert found.name == "checkpoint-1"
        assert path.name in warnings[0]
        tally["corruptions found"] += 1
