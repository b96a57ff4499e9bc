from __future__ import annotations

import numpy as np
import pytest

from fastalign.reference import CacheError
from fastalign.reference.files import read_json, write_json
from fastalign.reference.shards import write_shard
from fastalign.reference.store import Problem, Store, create_store, write_manifest

KEYS = [bytes([i]) * 16 for i in range(6)]
PAYLOAD = np.float32([-1.25, -2.5]).tobytes()


@pytest.fixture
def root(tmp_path, digest):
    """A cache with two writers: `early` with two shards, `late` with one of another reference."""
    root = tmp_path / "cache"
    create_store(root)
    shards = {"early-000000": digest, "early-000001": digest, "late-000000": digest[::-1]}
    records = {
        name: write_shard(
            root / "shards" / f"{name}.safetensors",
            reference,
            KEYS[2 * i : 2 * i + 2],
            [np.full(3, -i, np.float32)] * 2,
        )
        for i, (name, reference) in enumerate(shards.items())
    }
    write_manifest(root, "early", [records["early-000000"], records["early-000001"]], {})
    write_manifest(root, "late", [records["late-000000"]], {})
    for reference in (digest, digest[::-1]):
        write_json(root / "references" / f"{reference}.json", {"identity": None, "source": "test"})
    return root


def names(store: Store) -> list[str]:
    return sorted(name.removesuffix(".safetensors") for name in store.shards)


def test_a_sound_cache(root, digest):
    store = Store(root)
    assert names(store) == ["early-000000", "early-000001", "late-000000"]
    assert (store.problems, store.unlisted, store.retired, store.damaged()) == ([], {}, {}, {})
    assert store.references() == sorted([digest, digest[::-1]])
    assert store.verify() == []


def test_only_the_shards_of_one_reference(root, digest):
    (root / "shards" / "late-000000.safetensors").write_bytes(b"not even looked at")
    store = Store(root, digest)
    assert names(store) == ["early-000000", "early-000001"]
    assert store.problems == []


def test_create_is_idempotent_and_refuses_a_folder_of_others(root, tmp_path):
    create_store(root)
    assert Store(root).problems == []
    create_store(tmp_path / "deep" / "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(CacheError, match=r"mine has no format\.json and is not empty \(it holds thesis\.tex\)"):
        create_store(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_folder_that_another_process_is_just_making(tmp_path):
    (tmp_path / ".format.json.0123.tmp").write_bytes(b"half")
    create_store(tmp_path)
    assert Store(tmp_path).problems == []


def test_a_folder_that_another_process_has_just_made(tmp_path, monkeypatch):
    """Made between the look for the format and the look at what is there."""
    from pathlib import Path

    real = Path.iterdir

    def iterdir(path):
        if path == tmp_path:
            monkeypatch.setattr(Path, "iterdir", real)
            create_store(tmp_path)
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    create_store(tmp_path)
    assert Store(tmp_path).problems == []


def test_no_cache(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CacheError, match=r"is no reference cache: it has no format\.json"):
            Store(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="is no reference cache"):
        Store(tmp_path / "file")


def test_another_format_version_is_refused_and_left_alone(root):
    write_json(root / "format.json", {"format": "fastalign-reference-cache", "version": 2})
    before = sorted(path.stat().st_mtime_ns for path in root.rglob("*"))
    for action in (Store, create_store):
        with pytest.raises(CacheError, match="version 2; this fastalign reads fastalign-reference-cache version 1"):
            action(root)
    assert sorted(path.stat().st_mtime_ns for path in root.rglob("*")) == before


def test_a_damaged_format_file_is_named(root, flip_bit):
    flip_bit(root / "format.json", 100)
    with pytest.raises(CacheError, match=r"format\.json"):
        Store(root)


def test_an_unlisted_shard_counts_if_it_is_sound(root, digest, flip_bit):
    path = root / "shards" / "copied-000000.safetensors"
    write_shard(path, digest, KEYS[:1], [np.frombuffer(PAYLOAD, np.float32)])
    store = Store(root)
    assert "copied-000000" in names(store)
    assert list(store.unlisted) == [path.name]
    assert store.problems == []
    for where in (path.read_bytes().index(PAYLOAD), path.stat().st_size - 1):  # log-probs; keys, in the index
        flip_bit(path, 8 * where)
        damaged = Store(root)
        assert "copied-000000" not in names(damaged)
        assert [problem.file for problem in damaged.problems] == ["shards/copied-000000.safetensors"]
        flip_bit(path, 8 * where)


def test_a_missing_shard(root):
    (root / "shards" / "early-000001.safetensors").unlink()
    store = Store(root)
    assert names(store) == ["early-000000", "late-000000"]
    assert store.problems == [
        Problem("shards/early-000001.safetensors", "missing", "listed in a manifest but not there")
    ]
    assert store.damaged() == {"early-000001.safetensors": "missing"}


def test_a_shard_under_another_ones_name(root):
    """Sound in itself, but not what the manifest says."""
    shards = root / "shards"
    (shards / "early-000000.safetensors").write_bytes((shards / "late-000000.safetensors").read_bytes())
    (problem,) = Store(root).problems
    assert str(problem) == "shards/early-000000.safetensors: it is another shard than its manifest lists"


def test_a_rewritten_shard_of_the_same_shape_is_found_by_verify(root, digest):
    path = root / "shards" / "early-000000.safetensors"
    write_shard(path, digest, KEYS[:2], [np.full(3, -7, np.float32)] * 2)
    store = Store(root)
    assert store.problems == []
    (problem,) = store.verify()
    assert problem.file == "shards/early-000000.safetensors"
    assert "not the one in its manifest" in problem.what


def test_a_damaged_manifest_costs_no_shard(root, flip_bit):
    flip_bit(root / "manifests" / "early.json", 999)
    store = Store(root)
    assert names(store) == ["early-000000", "early-000001", "late-000000"]
    assert [(problem.file, problem.kind) for problem in store.problems] == [("manifests/early.json", "damaged")]
    assert len(store.unlisted) == 2


@pytest.mark.parametrize(
    "content",
    [
        {"shards": [{"file": "x.safetensors"}], "retired": {}},
        {"shards": [], "retired": {"../../precious.safetensors": "damaged"}},
        {"shards": 5, "retired": {}},
        {"retired": {}},
    ],
    ids=["fields", "path", "type", "key"],
)
def test_a_manifest_with_a_right_checksum_and_nonsense_in_it(root, content):
    write_json(root / "manifests" / "late.json", content)
    store = Store(root)
    assert [problem.file for problem in store.problems] == ["manifests/late.json"]
    assert store.retired == {}


def test_a_manifest_cannot_point_outside_the_cache(root, tmp_path):
    content = read_json(root / "manifests" / "late.json")
    content["shards"][0]["file"] = "../../outside.safetensors"
    write_json(root / "manifests" / "late.json", content)
    (problem,) = Store(root).problems
    assert "is not the name of a shard" in problem.what


def test_retired_shards_are_not_looked_at(root, flip_bit):
    flip_bit(root / "shards" / "early-000000.safetensors", 77)
    (root / "shards" / "early-000001.safetensors").unlink()
    assert len(Store(root).problems) == 2
    write_manifest(root, "repair", [], {"early-000000.safetensors": "damaged", "early-000001.safetensors": "missing"})
    store = Store(root)
    assert store.verify() == []
    assert names(store) == ["late-000000"]


def test_a_shard_that_was_missing_and_came_back_counts(root):
    write_manifest(root, "repair", [], {"early-000001.safetensors": "missing"})
    assert "early-000001" in names(Store(root))


def test_an_unreadable_shard_is_not_called_damaged(root, monkeypatch):
    from fastalign.reference import store as module

    real = module.Shard

    def denied(path):
        if path.name.startswith("early-000000"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(module, "Shard", denied)
    store = Store(root)
    assert store.problems == [Problem("shards/early-000000.safetensors", "unreadable", "Permission denied")]
    assert store.damaged() == {}  # so no build gives it up


def test_verify_names_missing_and_damaged_descriptions(root, digest, flip_bit):
    (root / "references" / f"{digest}.json").unlink()
    flip_bit(root / "references" / f"{digest[::-1]}.json", 30)
    found = {problem.file: problem.kind for problem in Store(root).verify()}
    assert found == {f"references/{digest}.json": "missing", f"references/{digest[::-1]}.json": "damaged"}
