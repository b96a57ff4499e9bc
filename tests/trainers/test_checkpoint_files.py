"""Folders of checkpoints: whole or not there, whatever happens to them and at whatever moment."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.trainers.checkpoint_files import (
    MANIFEST,
    UNFINISHED,
    CheckpointError,
    check,
    check_to_resume,
    checkpoints,
    clear_unfinished,
    finish_published,
    newest_whole,
    prune,
    publish,
    seal,
)


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    """Syncs cost seconds on a busy disk, and no test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def fill(folder: Path, text: str = "weights") -> Path:
    (folder / "critic").mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "critic" / "model.safetensors").write_text(f"critic {text}")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "empty").write_bytes(b"")
    return folder


def save(root: Path, step: int, text: str = "weights") -> Path:
    """As a trainer does."""
    clear_unfinished(root)
    staged, final = root / UNFINISHED / f"checkpoint-{step}", root / f"checkpoint-{step}"
    seal(fill(staged, text))
    publish(staged, final)
    clear_unfinished(root)
    return final


def test_a_sealed_folder_is_as_written(tmp_path):
    folder = save(tmp_path, 3)
    check(folder)
    assert check_to_resume(folder) is None
    assert set(json.loads((folder / MANIFEST).read_text())["content"]["files"]) == {
        "critic/model.safetensors", "empty", "model.safetensors", "trainer_state.json",
    }  # fmt: skip
    moved = folder.rename(tmp_path / "elsewhere")
    check(moved)
    (moved / "notes.txt").write_text("of no concern")
    check(moved)


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_to_any_file_is_found_and_named(data):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        older, newer = save(root, 2), save(root, 4)
        files = sorted(path for path in newer.rglob("*") if path.is_file())
        victim = files[data.draw(st.integers(0, len(files) - 1))]
        content = bytearray(victim.read_bytes())
        match data.draw(st.sampled_from(["flip", "truncate", "append", "delete"] if content else ["append", "delete"])):
            case "flip":
                bit = data.draw(st.integers(0, 8 * len(content) - 1))
                content[bit // 8] ^= 1 << bit % 8
                victim.write_bytes(content)
            case "truncate":
                victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
            case "append":
                victim.write_bytes(content + b"\n")
            case "delete":
                victim.unlink()
        with pytest.raises(CheckpointError, match=victim.relative_to(newer).as_posix()):
            check(newer)
        chosen, reasons = newest_whole(root)
        assert chosen == older
        (reason,) = reasons
        assert str(newer) in reason
        assert victim.name in reason


def test_without_any_whole_checkpoint_each_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="No valid checkpoint found in output directory"):
        newest_whole(tmp_path)
    with pytest.raises(CheckpointError, match="No valid checkpoint found in output directory"):
        newest_whole(tmp_path / "nowhere")
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 .* is missing; .*checkpoint-1 .* is missing"):
        newest_whole(tmp_path)


def test_checkpoints_of_earlier_versions_have_no_manifest(tmp_path):
    old = fill(tmp_path / "checkpoint-9")
    chosen, (warning,) = newest_whole(tmp_path)
    assert chosen == old
    assert "not verified" in warning
    (old / "trainer_state.json").unlink()  # it was not written to the end
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is missing"):
        check_to_resume(old)
    fill(tmp_path / "checkpoint-12")
    sealed = save(tmp_path, 10)  # one of which everything is known goes before a newer one of which nothing is
    chosen, reasons = newest_whole(tmp_path)
    assert chosen == sealed
    assert len(reasons) == 1
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        check_to_resume(tmp_path / "checkpoint-11")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_cannot_point_outside(tmp_path, name):
    from fastalign.reference.files import read_json, write_json

    folder = save(tmp_path, 1)
    content = read_json(folder / MANIFEST)
    content["files"][name] = content["files"]["empty"]
    write_json(folder / MANIFEST, content)
    with pytest.raises(CheckpointError, match="not inside the checkpoint"):
        check(folder)
    write_json(folder / MANIFEST, content | {"version": 2})
    with pytest.raises(CheckpointError, match="version 2; this fastalign reads version 1"):
        check(folder)


def test_the_oldest_go_and_what_is_kept_stays(tmp_path):
    folders = [save(tmp_path, step) for step in (1, 2, 10, 3)]  # 3: after a resume from 2, say
    for age, folder in enumerate(folders):
        os.utime(folder, (1000 + age, 1000 + age))
    prune(tmp_path, None, set())
    prune(tmp_path, 4, {folders[3]})
    assert checkpoints(tmp_path) == [folders[0], folders[1], folders[3], folders[2]]
    prune(tmp_path, 2, {folders[3], folders[0]})
    assert checkpoints(tmp_path) == [folders[0], folders[3]]
    prune(tmp_path, 1, {folders[3], folders[0]})  # the newest and the best one
    assert checkpoints(tmp_path) == [folders[0], folders[3]]


class Crash(BaseException):
    """The process dies: nothing after it happens."""


def test_a_crash_at_any_call_leaves_the_former_checkpoints_or_the_new_one(tmp_path, monkeypatch):
    """Every call that changes the disk is the last one, in turn; the step that is saved may be there already."""
    calls, last = 0, 0
    changing = [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "open")]

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last:
                raise Crash
            return original(*args, **kwargs)

        return call

    for again in (False, True):
        for last in range(1, 60):
            root = tmp_path / f"{again}-{last}"
            save(root, 1, "first")
            save(root, 2, "second")
            if again:
                save(root, 3, "third")
            calls = 0
            with monkeypatch.context() as patch:
                for module, name in changing:
                    patch.setattr(module, name, counted(getattr(module, name)))
                try:
                    final = save(root, 3, "third")
                    prune(root, 1, {final})
                    crashed = False
                except Crash:
                    crashed = True
            finish_published(root)
            chosen, reasons = newest_whole(root)
            assert reasons == []  # whatever has the name of a checkpoint is whole
            assert chosen.name in (["checkpoint-3"] if again or not crashed else ["checkpoint-2", "checkpoint-3"])
            assert (chosen / "model.safetensors").read_text() == {"2": "second", "3": "third"}[chosen.name[-1]]
            for folder in checkpoints(root):
                check(folder)
            following = save(root, 4)
            prune(root, 1, {following})
            assert sorted(path.name for path in root.iterdir()) == ["checkpoint-4"]
            if not crashed:
                break
        else:
            pytest.fail("more calls than were tried")
        assert last > 10
