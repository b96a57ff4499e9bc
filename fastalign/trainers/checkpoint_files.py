"""Folders of checkpoints: written apart, sealed with checksums, renamed into place; whole, or not there.

    output_dir/checkpoint-<step>/                           a checkpoint
    output_dir/checkpoint-<step>/fastalign_manifest.json    size and SHA-256 of each of its files, written last
    output_dir/.unfinished/                                 what is being written, and what is being deleted

A crash at any moment leaves the former checkpoints as they were and at most one `.unfinished` beside them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from fastalign.reference.errors import DamagedFileError
from fastalign.reference.files import file_sha256, read_json, sync_folder, write_json

MANIFEST = "fastalign_manifest.json"
UNFINISHED = ".unfinished"
_FORMAT = {"format": "fastalign-checkpoint", "version": 1}
_TRAINER_STATE = "trainer_state.json"  # what transformers writes last
_NAME = re.compile(r"checkpoint-(\d+)")
_THREADS = 4  # hashing and syncing let go of the interpreter


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or is not what was written; the message names the file."""


def seal(folder: Path) -> None:
    """Write the manifest of a finished folder, after all its files are durable. Raises OSError."""
    paths = sorted(path for path in folder.rglob("*") if path.name != MANIFEST)
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = list(pool.map(_durable_facts, files))
    for path in paths:
        if path.is_dir():
            sync_folder(path)
    listed = {path.relative_to(folder).as_posix(): fact for path, fact in zip(files, facts, strict=True)}
    write_json(folder / MANIFEST, _FORMAT | {"files": listed})


def _durable_facts(path: Path) -> dict[str, Any]:
    with open(path, "rb+") as file:  # some systems sync only what is open for writing
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def is_sealed(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def check(folder: Path) -> None:
    """Read all of a sealed checkpoint. Raises CheckpointError naming the first file that is not as it was written."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: there is no such checkpoint")
    try:
        content = read_json(folder / MANIFEST)
        if {name: content.get(name) for name in _FORMAT} != _FORMAT:
            found = f"{content.get('format')} version {content.get('version')}"
            raise CheckpointError(f"{folder} is a {found}; this fastalign reads version {_FORMAT['version']}")
        files = {_inside(name): (fact["bytes"], fact["sha256"]) for name, fact in content["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {MANIFEST} is missing") from None
    except DamagedFileError as error:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST}: {error.what}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is no manifest ({error!r})") from None
    for name, (size, _) in files.items():  # sizes cost nothing and tell most
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a whole checkpoint: {name} is missing")
        if (now := path.stat().st_size) != size:
            raise CheckpointError(f"{folder} is damaged: {name} has {now} bytes, {size} were written")
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(file_sha256, [folder / name for name in files])
        for (name, (_, expected)), digest in zip(files.items(), digests, strict=True):
            if digest != expected:
                raise CheckpointError(f"{folder} is damaged: the checksum of {name} is not that of what was written")


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise TypeError(f"{name!r} is not inside the checkpoint")
    return name


def check_to_resume(folder: Path) -> str | None:
    """`check`, but for a folder without a manifest, of an earlier version or of transformers; None, or a warning.

    Without a manifest nothing can be verified: that it was written to the end is all that is asked of it.
    """
    if not folder.is_dir() or is_sealed(folder):
        check(folder)
        return None
    if not (folder / _TRAINER_STATE).is_file():
        raise CheckpointError(f"{folder} is not a whole checkpoint: {_TRAINER_STATE} is missing")
    return f"{folder} has no {MANIFEST}: its files are not verified"


def checkpoints(root: Path) -> list[Path]:
    """The folders named as checkpoints in `root`, by step."""
    found = {path: _NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir()} if root.is_dir() else {}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name.split("-")[1]))


def newest_whole(root: Path) -> tuple[Path, list[str]]:
    """The checkpoint to go on from, and a warning for each newer one that is passed over.

    It is the last that is sealed and as it was written; where none at all is sealed, the last that is complete. Raises
    CheckpointError where there is none, naming what is wrong with each.
    """
    there = checkpoints(root)[::-1]
    sealed = any(map(is_sealed, there))
    reasons: list[str] = []
    for folder in there:
        try:
            if sealed:
                check(folder)
                return folder, reasons
            unverified = check_to_resume(folder)
            return folder, [*reasons, unverified] if unverified else reasons
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError("; ".join([f"No valid checkpoint found in output directory ({root})", *reasons]))


def publish(staged: Path, final: Path) -> None:
    """Rename a sealed folder into place; one that is there already (the same step, done again) makes way."""
    if final.exists():
        os.replace(final, _free_name(staged.parent, f"replaced-{final.name}"))
    os.replace(staged, final)
    sync_folder(final.parent)


def finish_published(root: Path) -> None:
    """Put the checkpoint in place whose writer died after sealing it."""
    for staged in checkpoints(root / UNFINISHED):
        final = root / staged.name
        if final.exists() or not is_sealed(staged):
            continue
        try:
            check(staged)
        except CheckpointError:
            continue
        publish(staged, final)


def prune(root: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete the oldest checkpoints until `limit` are left, none of `keep` (None or 0: no limit), and the unfinished.

    They leave by a rename, so that what is half deleted has not the name of a checkpoint.
    """
    if not limit or limit < 0:
        return
    there = sorted(checkpoints(root), key=lambda path: path.stat().st_mtime)  # stable: by step where times are equal
    surplus = len(there) - max(limit, len(set(there) & set(keep)))
    for folder in [path for path in there if path not in keep][: max(surplus, 0)]:
        (root / UNFINISHED).mkdir(exist_ok=True)
        os.replace(folder, _free_name(root / UNFINISHED, f"removed-{folder.name}"))
    clear_unfinished(root)


def _free_name(folder: Path, name: str) -> Path:
    shutil.rmtree(folder / name, ignore_errors=True)
    return folder / name


def clear_unfinished(root: Path) -> None:
    shutil.rmtree(root / UNFINISHED, ignore_errors=True)
