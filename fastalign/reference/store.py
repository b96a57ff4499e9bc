"""The folder of a cache: which shards count, and what is wrong with the others.

    format.json                      the format's version; the first file written
    references/<digest>.json         what a reference digest stands for, in words
    manifests/<writer>.json          the shards one writer finished, replaced atomically after each of them
    shards/<writer>-<n>.safetensors  finished rows; never changed
    weights.json                     weight digests remembered by file identity

Every writer has a name and a manifest of its own, so that several write at once without a lock, on a shared filesystem
too; readers take the union. A shard that no manifest lists (its writer died between the two renames, or it was copied
here) is checked byte by byte before it counts. A damaged shard is left out and named; a later build marks it *retired*.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastalign.reference.errors import CacheError, DamagedFileError
from fastalign.reference.files import TEMPORARY, file_sha256, read_json, write_json
from fastalign.reference.shards import SUFFIX, Shard, ShardRecord, is_plain_name

FORMAT = {"format": "fastalign-reference-cache", "version": 1}
FORMAT_FILE = "format.json"
FOLDERS = ("references", "manifests", "shards")

DAMAGED, MISSING, UNREADABLE = "damaged", "missing", "unreadable"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a file. file: its path inside the cache; kind: damaged, missing or unreadable."""

    file: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def create_store(root: Path) -> None:
    """Make `root` a cache if it is a new or empty folder. Raises CacheError if it holds something else."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / FORMAT_FILE).exists():
        strangers = sorted(path.name for path in root.iterdir() if not path.name.endswith(TEMPORARY))
        if not strangers:
            write_json(root / FORMAT_FILE, dict(FORMAT))
        elif FORMAT_FILE not in strangers:  # else another process has made it a cache in between
            raise CacheError(
                f"{root} has no {FORMAT_FILE} and is not empty (it holds {strangers[0]}): not a reference cache"
            )
    check_format(root)
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)


def check_format(root: Path) -> None:
    """Raise CacheError unless `root` is a cache of the format that this version reads."""
    try:
        content = read_json(root / FORMAT_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"{root} is no reference cache: it has no {FORMAT_FILE}") from None
    if content != FORMAT:
        found = f"{content.get('format')} version {content.get('version')}"
        raise CacheError(f"{root} is a {found}; this fastalign reads {FORMAT['format']} version {FORMAT['version']}")


def write_manifest(root: Path, writer: str, records: list[ShardRecord], retired: dict[str, str]) -> None:
    """Replace a writer's manifest. retired: shard file → kind of problem, for shards that were rebuilt."""
    content = {"shards": [asdict(record) for record in records], "retired": retired, "writer": writer}
    write_json(root / "manifests" / f"{writer}.json", content)


class Store:
    """The state of a cache's folder at one moment. Raises CacheError if it is no cache of this format.

    shards: name → open Shard, the usable ones. records: name → ShardRecord, as the manifests list them. retired: names
    of damaged shards that a build has replaced. problems: what was found wrong. unlisted: sound shards in no manifest.
    reference: only that reference's shards are in `shards` (the others that manifests list are left unread).
    """

    def __init__(self, root: Path, reference: str | None = None) -> None:
        check_format(root)
        self.root = root
        self.shards: dict[str, Shard] = {}
        self.records: dict[str, ShardRecord] = {}
        self.retired: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.unlisted: dict[str, Shard] = {}
        # manifests first: a shard finished in between is then unlisted, never listed and missing
        for path in sorted((root / "manifests").glob("*.json")):
            self._read_manifest(path)
        present = {path.name: path for path in sorted((root / "shards").glob(f"*{SUFFIX}"))}
        for name in sorted(set(self.records) | set(present)):
            record = self.records.get(name)
            if record is not None and reference not in (None, record.reference):
                continue
            if name not in present:
                if name not in self.retired:
                    self._report(f"shards/{name}", MISSING, "listed in a manifest but not there")
            elif self.retired.get(name, MISSING) == MISSING:  # one that was missing and came back is as good as any
                self._open_shard(name, present[name], reference)

    def references(self) -> list[str]:
        """Digests of the references whose rows are here, in sound shards or in listed ones."""
        listed = {record.reference for name, record in self.records.items() if name not in self.retired}
        return sorted(listed | {shard.reference for shard in (*self.shards.values(), *self.unlisted.values())})

    def damaged(self) -> dict[str, str]:
        """Shards whose rows cannot be had and should be rebuilt: name → kind (damaged or missing)."""
        prefix = "shards/"
        return {
            p.file.removeprefix(prefix): p.kind
            for p in self.problems
            if p.file.startswith(prefix) and p.kind != UNREADABLE
        }

    def _report(self, file: str, kind: str, what: str) -> None:
        self.problems.append(Problem(file, kind, what))

    def _read_manifest(self, path: Path) -> None:
        file = f"manifests/{path.name}"
        try:
            content = read_json(path)
            records = [_record(fields) for fields in content["shards"]]
            self.retired |= {_plain_name(name): str(kind) for name, kind in content["retired"].items()}
        except DamagedFileError as error:
            self._report(file, DAMAGED, error.what)
        except OSError as error:
            self._report(file, UNREADABLE, error.strerror or str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._report(file, DAMAGED, f"not a manifest ({error})")
        else:
            self.records |= {record.file: record for record in records}

    def _open_shard(self, name: str, path: Path, reference: str | None) -> None:
        file, record = f"shards/{name}", self.records.get(name)
        try:
            if record is not None and (size := path.stat().st_size) != record.bytes:
                raise DamagedFileError(path, f"it has {size} bytes, its manifest says {record.bytes}")
            shard = Shard(path)
            if record is None:
                shard.check()
                self.unlisted[name] = shard
            elif (shard.reference, len(shard), shard.tokens) != (record.reference, record.rows, record.tokens):
                raise DamagedFileError(path, "it is another shard than its manifest lists")
        except DamagedFileError as error:
            self._report(file, DAMAGED, error.what)
        except OSError as error:
            self._report(file, UNREADABLE, error.strerror or str(error))
        else:
            if reference in (None, shard.reference):
                self.shards[name] = shard

    def verify(self) -> list[Problem]:
        """Read every byte of every shard that counts, and compare with the manifests; returns all problems."""
        problems = list(self.problems)
        for name, shard in self.shards.items():
            try:
                shard.check()
                if name in self.records and file_sha256(shard.path) != self.records[name].sha256:
                    raise DamagedFileError(shard.path, "the checksum of the file is not the one in its manifest")
            except DamagedFileError as error:
                problems.append(Problem(f"shards/{name}", DAMAGED, error.what))
            except OSError as error:
                problems.append(Problem(f"shards/{name}", UNREADABLE, error.strerror or str(error)))
        return problems + self._verify_descriptions()

    def description(self, digest: str) -> dict[str, Any]:
        """What was written about a reference. Raises DamagedFileError or OSError."""
        return read_json(self.root / "references" / f"{digest}.json")

    def _verify_descriptions(self) -> list[Problem]:
        problems = []
        for digest in sorted({shard.reference for shard in self.shards.values()}):
            file = f"references/{digest}.json"
            try:
                self.description(digest)
            except FileNotFoundError:
                problems.append(Problem(file, MISSING, "the description of a reference whose rows are here"))
            except DamagedFileError as error:
                problems.append(Problem(file, DAMAGED, error.what))
            except OSError as error:
                problems.append(Problem(file, UNREADABLE, error.strerror or str(error)))
        return problems


def _record(fields: dict[str, Any]) -> ShardRecord:
    record = ShardRecord(**fields)
    _plain_name(record.file)
    if not is_plain_name(record.reference):
        raise ValueError(f"{record.reference!r} is no reference digest")
    return record


def _plain_name(name: str) -> str:
    if not is_plain_name(name) or not name.endswith(SUFFIX):
        raise ValueError(f"{name!r} is not the name of a shard")
    return name
