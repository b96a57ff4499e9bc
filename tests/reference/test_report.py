from __future__ import annotations

import pytest

from fastalign.reference import (
    CacheError,
    ReferenceCache,
    ReferenceModel,
    inspect,
    render_problems,
    render_summary,
    verify,
)
from fastalign.reference.shards import Shard
from fastalign.reference.store import create_store
from fastalign.reference.writer import ShardWriter


@pytest.fixture
def cache(tmp_path, tiny_model, scorer, digest, make_sequences):
    """Two references, one of them a model; one row twice."""
    sequences = make_sequences(9)
    cache = ReferenceCache.build(
        tmp_path, ReferenceModel.from_model(tiny_model(), temperature=0.5), sequences, progress=False
    )
    ReferenceCache.build(tmp_path, digest, sequences[:4], score=scorer, progress=False, shard_tokens=1)
    from fastalign.reference.sequences import sequence_keys

    with ShardWriter(tmp_path, digest, shard_tokens=10, shard_seconds=10) as writer:
        writer.add(sequence_keys(digest, sequences[:1])[0].tobytes(), scorer.logps(sequences[0]))
    return cache


def test_inspect(cache, digest):
    summary = inspect(cache.path)
    assert summary == cache.inspect()
    assert (summary.rows, summary.problems, summary.retired) == (13, [], [])
    by_digest = {reference.digest: reference for reference in summary.references}
    model, given = by_digest[cache.reference], by_digest[digest]
    assert (model.rows, model.duplicates, model.shards) == (9, 0, 1)
    assert (given.rows, given.duplicates, given.shards) == (4, 1, 5)
    assert model.source == "LlamaForCausalLM in memory"
    assert (model.identity["dtype"], model.identity["head"]["temperature"]) == ("float32", 0.5)
    assert (given.source, given.identity) == ("given by its digest", None)
    assert summary.bytes == sum(path.stat().st_size for path in (cache.path / "shards").iterdir())
    assert model.tokens == cache.report.tokens


def test_the_summary_as_text(cache, digest):
    text = render_summary(inspect(cache.path))
    for part in (
        cache.reference[:16],
        digest[:16],
        "LlamaForCausalLM in memory",
        "float32, sdpa, temperature 0.5",
        "KiB",
    ):
        assert part in text
    assert "\x1b" not in text
    assert "problem" not in text


def test_damage_shows(cache, digest):
    victim = min((cache.path / "shards").iterdir())
    victim.write_bytes(b"")
    (problem,) = verify(cache.path)
    assert problem.file == f"shards/{victim.name}"
    assert render_problems([problem]) == f"1 problem found\n  {problem}\n"
    assert str(problem) in " ".join(render_summary(inspect(cache.path)).split())
    assert render_problems([]) == "no problems found\n"


def test_replaced_shards_show(cache, digest, scorer, make_sequences):
    victim = next(path for path in (cache.path / "shards").iterdir() if Shard(path).reference == digest)
    victim.write_bytes(victim.read_bytes()[:-1])
    ReferenceCache.build(cache.path, digest, make_sequences(9)[:4], score=scorer, progress=False)
    summary = inspect(cache.path)
    assert (summary.retired, summary.problems) == ([victim.name], [])
    text = "".join(render_summary(summary).split())
    assert f"canbedeleted:shards/{victim.name}" in text
    victim.unlink()
    assert inspect(cache.path).retired == []
    assert verify(cache.path) == []


def test_without_a_description(cache):
    (cache.path / "references" / f"{cache.reference}.json").unlink()
    assert "no description" in render_summary(inspect(cache.path))


def test_an_empty_cache_and_none(tmp_path):
    create_store(tmp_path / "new")
    assert render_summary(inspect(tmp_path / "new")) == f"reference cache {tmp_path / 'new'}: empty\n"
    assert verify(tmp_path / "new") == []
    for action in (inspect, verify):
        with pytest.raises(CacheError, match="is no reference cache"):
            action(tmp_path / "nowhere")


def test_a_cache_whose_first_build_was_killed_at_once(tmp_path):
    create_store(tmp_path)
    for folder in ("shards", "manifests", "references"):
        (tmp_path / folder).rmdir()
    assert inspect(tmp_path).rows == 0
    assert verify(tmp_path) == []
