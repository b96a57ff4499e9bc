"""A build that is killed: many small batches and shards, of a scorer with known answers. Run in a process of its own.

Set beforehand: cache_path, digest, sequences, journal_path (one byte a batch), offset (where to begin).
"""

import os
import time

import numpy as np

from fastalign.reference import ReferenceCache

os.fsync = lambda descriptor: None  # a kill is no power cut
journal = os.open(journal_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)  # noqa: F821


def score(batch):
    os.write(journal, b".")
    time.sleep(0.003)  # a model takes its time
    return [known(np.asarray(ids, np.int64), start) for ids, start in batch]


def known(ids, start):
    return (-(ids.cumsum() % 997) / 8 - start)[start:].astype(np.float32)


asked = sequences[offset:] + sequences[:offset]  # noqa: F821
ReferenceCache.build(
    cache_path,  # noqa: F821
    digest,  # noqa: F821
    asked,
    score=score,
    shard_tokens=400,
    batch_tokens=60,
    progress=False,
)
