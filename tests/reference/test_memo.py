from __future__ import annotations

import errno
import os
import shutil

import pytest

from fastalign.reference import memo
from fastalign.reference.memo import IdentityMemo, file_identities, memo_key


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "modeling.py", "README.md", "optimizer.pt"):
        (folder / name).write_bytes(name.encode())
    (folder / "checkpoint-1").mkdir()
    return folder


def test_files_that_a_load_reads(folder):
    identities = file_identities([folder])
    assert sorted(os.path.basename(path) for path in identities) == [
        "config.json", "model.safetensors", "modeling.py", "optimizer.pt",
    ]  # fmt: skip
    stat = (folder / "config.json").stat()
    assert identities[str((folder / "config.json").resolve())] == [
        stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns,
    ]  # fmt: skip


def replaced(path):
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


def rewritten_with_its_old_time(path):
    stat = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES = {
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "longer": lambda path: path.write_bytes(b"other"),
    "replaced": replaced,
    "rewritten": rewritten_with_its_old_time,
    "deleted": lambda path: path.unlink(),
    "added": lambda path: (path.parent / "adapter.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_file_is_seen(folder, change):
    before = file_identities([folder])
    CHANGES[change](folder / "model.safetensors")
    assert file_identities([folder]) != before


def test_links_are_followed(folder, tmp_path):
    """The hub's snapshots are folders of links to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    before = file_identities([snapshot])
    assert list(before) == [str((folder / "model.safetensors").resolve())]
    (folder / "model.safetensors").write_bytes(b"another")
    assert file_identities([snapshot]) != before


def test_the_key_covers_files_arguments_and_versions(folder, monkeypatch):
    files = file_identities([folder])
    keys = {
        memo_key(files, {"dtype": "float32"}),
        memo_key(files, {"dtype": "bfloat16"}),
        memo_key({}, {"dtype": "float32"}),
    }
    monkeypatch.setattr(memo.transformers, "__version__", "99")
    keys.add(memo_key(files, {"dtype": "float32"}))
    assert len(keys) == 4


def test_remembers(tmp_path):
    one, two = IdentityMemo(tmp_path), IdentityMemo(tmp_path)
    assert one.get("a") is None
    one.put("a", {"weights": "1"})
    two.put("b", {"weights": "2"})
    assert (one.get("a"), one.get("b")) == ({"weights": "1"}, {"weights": "2"})


def test_a_damaged_memo_is_started_afresh(tmp_path, flip_bit, caplog):
    IdentityMemo(tmp_path).put("a", {"weights": "1"})
    flip_bit(tmp_path / "weights.json", 100)
    assert IdentityMemo(tmp_path).get("a") is None
    assert "weights.json" in caplog.text
    IdentityMemo(tmp_path).put("b", {"weights": "2"})
    assert IdentityMemo(tmp_path).get("b") == {"weights": "2"}


@pytest.mark.parametrize(("number", "tolerated"), [(errno.EROFS, True), (errno.EACCES, True), (errno.ENOSPC, False)])
def test_a_memo_that_cannot_be_written(tmp_path, monkeypatch, caplog, number, tolerated):
    def refused(path, content):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(memo, "write_json", refused)
    if tolerated:
        IdentityMemo(tmp_path).put("a", {})
        assert "the weights will be hashed again" in caplog.text
    else:
        with pytest.raises(OSError, match="No space left"):
            IdentityMemo(tmp_path).put("a", {})


def test_a_copied_folder_is_another_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert memo_key(file_identities([folder]), {}) != memo_key(file_identities([tmp_path / "copy"]), {})
