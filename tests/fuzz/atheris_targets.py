"""Coverage-guided fuzzing of what we parse ourselves: python atheris_targets.py TARGET [libFuzzer's flags].

Needs atheris (pip install atheris). Without a target it prints their names. `-max_total_time=60` stops after a minute;
what fails is left in a file `crash-*` and is tried again by naming that file.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris

PARSERS = [*("fastalign.data", "fastalign.cli", "fastalign.reference", "yaml")]
PARSERS += ["fastalign.trainers.checkpoint_files"]

with atheris.instrument_imports(include=PARSERS, enable_loader_override=False):
    import yaml  # noqa: F401

    from fastalign.cli import flags, values
    from fastalign.data import conversations, files, rankings, sources
    from fastalign.data.examples import ExampleParser
    from fastalign.data.formats import pair_parser
    from fastalign.data.judgements import label_parser, list_parser
    from fastalign.data.prompts import prompt_parser
    from fastalign.data.report import RowError
    from fastalign.data.rows import RowSource, Unreadable
    from fastalign.reference import files as cache_files
    from fastalign.reference import memo, shards, store
    from fastalign.reference.errors import DamagedFileError
    from fastalign.trainers import checkpoint_files

Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {}
SEEDS: dict[str, list[bytes]] = {}
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
DIGEST = "a" * 64


def target(*seeds: bytes) -> Callable[[Target], Target]:
    def register(function: Target) -> Target:
        TARGETS[function.__name__] = function
        SEEDS[function.__name__] = [b"", *seeds]
        return function

    return register


@contextlib.contextmanager
def refusing(kind: type[Exception] = ValueError) -> Iterator[None]:
    """A message of ours is what may come out; Python's own UnicodeError says nothing to a user."""
    try:
        yield
    except kind as error:
        if isinstance(error, UnicodeError) or not 0 < len(str(error)) < 20_000:
            raise AssertionError(f"not a message for a user: {error!r}") from error


# ---- data files

ROW = b'{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rank": [1, 2.5e3], "label": true}\n'


def read(name: str, data: bytes) -> None:
    path = FOLDER / name
    path.write_bytes(data)
    with refusing():
        source = files.read_file(path)
        for row in source.read(0, len(source)):
            if isinstance(row, Unreadable):
                assert row.detail


@target(ROW, ROW * 3, b"\xef\xbb\xbf" + ROW, b'{"a": 1, "a": 2}\n[1]\nnull\n\n"\\ud800"')
def json_lines(data: bytes) -> None:
    read("data.jsonl", data)


@target(b"[" + ROW + b"," + ROW + b"]", b"[]", ROW)
def json_array(data: bytes) -> None:
    read("data.json", data)


@target(b'a,b\n1,"x\ny"\n', b"a\n\n1\n", b'"a""b",c\n')
def csv_file(data: bytes) -> None:
    read("data.csv", data)
    read("data.tsv", data.replace(b",", b"\t"))


@target(gzip.compress(ROW, mtime=0), gzip.compress(ROW * 9, mtime=0)[:-5])
def gzipped(data: bytes) -> None:
    read("data.jsonl.gz", data)


# ---- rows

KEYS = [
    *("prompt", "chosen", "rejected", "messages", "completion", "completions", "text", "rank", "ranking", "score"),
    *("label", "tools", "chat_template_kwargs", "image", "role", "content", "tool_calls", "chat_template"),
]
TEXTS = [
    *("", " ", "\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:", "user", "assistant", "system", "tool"),
    *("A > B = C", "2 > 1", "B>A", "\ud800", "a", "is blue", "is black"),
]


def value_of(provider: Any, depth: int = 0) -> Any:
    kind = provider.ConsumeIntInRange(0, 9 if depth < 4 else 6)
    if kind <= 1:
        return provider.PickValueInList(TEXTS)
    if kind == 2:
        return provider.ConsumeUnicode(12)
    if kind == 3:
        return provider.ConsumeInt(10)
    if kind == 4:
        return provider.ConsumeFloat()
    if kind == 5:
        return provider.ConsumeBool()
    if kind == 6:
        return None
    if kind == 7:
        return [value_of(provider, depth + 1) for _ in range(provider.ConsumeIntInRange(0, 4))]
    if kind == 8:
        return {"role": provider.PickValueInList(TEXTS[5:9]), "content": provider.PickValueInList(TEXTS)}
    names = (provider.PickValueInList(KEYS) for _ in range(provider.ConsumeIntInRange(0, 5)))
    return {name: value_of(provider, depth + 1) for name in names}


def row_of(provider: Any) -> Any:
    names = [provider.PickValueInList(KEYS[:14]) for _ in range(provider.ConsumeIntInRange(0, 6))]
    return {name: value_of(provider) for name in names} if names else value_of(provider)


@target(bytes(range(256)), bytes(range(255, -1, -1)))
def rows(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    format, template = provider.PickValueInList(["auto", "text", "chat"]), provider.ConsumeBool()
    makers = [
        lambda: pair_parser(format, template), lambda: list_parser(format, template, provider.ConsumeBool()),
        lambda: label_parser(format, template, provider.PickValueInList([None, "scalar", "binary"]), set()),
        lambda: prompt_parser(format, template),
        lambda: ExampleParser(format, template, provider.PickValueInList([None, True, False]), "text"),
    ]  # fmt: skip
    with refusing():
        parse = provider.PickValueInList(makers)()
        row = row_of(provider)
        kept = json.dumps(row, default=str)
        try:
            parse(row)
        finally:
            assert json.dumps(row, default=str) == kept, "the row was written to"


@target(b"\n\nHuman: a\n\nAssistant: b", b"\n\nHuman:\n\nHuman: x\n\nAssistant:", b"\n\nAssistant: a")
def transcripts(data: bytes) -> None:
    chat, cut = len(data) % 2 == 0, len(data) // 3
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(RowError):
        conversations.from_transcripts("\n\nHuman:" + text, "\n\nHuman:" + text[:cut] + "\n\nAssistant: c", chat=chat)
    with contextlib.suppress(RowError):
        prompt, answer = conversations.split_transcript("\n\nHuman:" + text, chat=chat)
        assert isinstance(prompt, list) == chat
        assert answer is None or answer


@target(b"\x03B > A = C", b"\x022>1", b"\x04d=c>b=a")
def ranking(data: bytes) -> None:
    count = data[0] % 32 if data else 0
    with contextlib.suppress(RowError):
        ranks = rankings.parse_ranking(data[1:].decode("utf-8", "replace"), count)
        assert len(ranks) == count
        assert set(ranks) == set(range(1, int(max(ranks)) + 1))


@target(b"\x63train[10%:-5]", b"\x00test", b"\x01a.b-c[:]", b"\xfftrain[:\xd9\xa3%]", b"\x09x[-3:]")
def split(data: bytes) -> None:
    count = data[0] if data else 0
    with refusing():
        _, bounds = sources._parse_split(data[1:].decode("utf-8", "replace"))
        cut = sources._slice(RowSource.of(range(count), "rows"), bounds)
        assert 0 <= cut.start <= cut.stop <= max(count, cut.start)


# ---- settings


@target(b"beta: 0.1\nmax_steps: 5\n", b"a: &x [1]\nb: *x\n", b"<<: {a: 1}\n", b"a: !!timestamp 2001-01-01\n? b\n: 2\n")
def yaml_file(data: bytes) -> None:
    path = FOLDER / "run.yaml"
    path.write_bytes(data)
    with refusing(flags.UsageError):
        assert all(isinstance(key, str) for key in flags.load_yaml(path))


HINTS = [bool, int, float, str, Path, list[str], list[float], dict[str, Any], bool | None, int | str | None]
HINTS += [list[int] | None, float | str, dict[str, Any] | str | None]


@target(b'\x07{"a": 1, "a": 2}', b"\x021e400", b"\x01no", b"\x05none")
def setting(data: bytes) -> None:
    hint = HINTS[(data[0] if data else 0) % len(HINTS)]
    made = value_of(atheris.FuzzedDataProvider(data))
    for given in (data[1:].decode("utf-8", "surrogateescape"), made):
        with contextlib.suppress(values.Mismatch):
            values.coerce(given, hint)


@target(b"--beta\0000.1\0--no-use-cpu", b"--a=b\0c", b"-x\0--\0--a\0--a")
def command_line(data: bytes) -> None:
    words = data.decode("utf-8", "surrogateescape").split("\0")
    with refusing(flags.UsageError):
        flags.collect([word for word in words if word.partition("=")[0] != "--config"], {"beta", "use_cpu", "a"}, "dpo")


# ---- what a cache or a checkpoint says of itself


def sound_shard() -> bytes:
    import numpy as np

    path = FOLDER / "sound.safetensors"
    if not path.exists():
        shards.write_shard(path, DIGEST, [b"k" * 16, b"l" * 16], [np.float32([-1.0, -2.0]), np.float32([-0.5])])
    return path.read_bytes()


@target(sound_shard())
def shard(data: bytes) -> None:
    path = FOLDER / "s.safetensors"
    path.write_bytes(data)
    try:
        opened = shards.Shard(path)
        opened.check()
    except (DamagedFileError, OSError):
        return
    keys = [key.tobytes() for key in opened.read_keys()]
    assert data == sound_shard() or len(opened) == len(keys), "a shard that was not written as it is"


def envelope(content: Any) -> bytes:
    return cache_files._envelope(content)


RECORD = {"file": "w-0.safetensors", "reference": DIGEST, "rows": 1, "tokens": 1, "bytes": 9, "sha256": DIGEST}


@target(json.dumps({"shards": [RECORD], "retired": {"v-1.safetensors": "damaged"}, "writer": "w"}).encode())
def manifest(data: bytes) -> None:
    """The content is what is tried: the checksum around it is right."""
    root = FOLDER / "cache"
    if not root.is_dir():
        store.create_store(root)
    try:
        content = json.loads(data)
        whole = envelope(content) if isinstance(content, dict) else data
    except (ValueError, RecursionError):
        whole = data
    (root / "manifests" / "w.json").write_bytes(whole)
    opened = store.Store(root)
    assert not opened.shards
    for name in (*opened.records, *opened.retired):
        assert "/" not in name
        assert name not in (".", "..")
    opened.verify()


@target(envelope({"a": 1}), envelope({"a": [1.5, None, "\u00e9"]}))
def checksummed_json(data: bytes) -> None:
    path = FOLDER / "content.json"
    path.write_bytes(data)
    try:
        content = cache_files.read_json(path)
    except DamagedFileError:
        return
    assert envelope(content) == data
    memo.IdentityMemo(FOLDER).get("x")


@target(json.dumps({"files": {"model.safetensors": {"bytes": 1, "sha256": DIGEST}}}).encode())
def checkpoint_manifest(data: bytes) -> None:
    folder = FOLDER / "checkpoint-1"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"x")
    try:
        content = json.loads(data)
        whole = envelope(checkpoint_files._FORMAT | content) if isinstance(content, dict) else data
    except (ValueError, RecursionError):
        whole = data
    (folder / checkpoint_files.MANIFEST).write_bytes(whole)
    with contextlib.suppress(checkpoint_files.CheckpointError):
        checkpoint_files.check(folder)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        print("\n".join(TARGETS))
        return
    name = sys.argv.pop(1)
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], TARGETS[name])
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
