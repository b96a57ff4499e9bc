"""Reference log-probs on disk: scored once, looked up for ever."""

from fastalign.reference.builder import BuildReport
from fastalign.reference.cache import ReferenceCache
from fastalign.reference.errors import CacheError, DamagedFileError, MissingLogpsError
from fastalign.reference.model import ReferenceModel
from fastalign.reference.report import CacheSummary, ReferenceSummary, inspect, render_problems, render_summary, verify
from fastalign.reference.scoring import ModelScorer, TokenScores, score
from fastalign.reference.sequences import PreferenceSequences, Scorer, TokenSequence
from fastalign.reference.store import Problem

__all__ = [
    "BuildReport",
    "CacheError",
    "CacheSummary",
    "DamagedFileError",
    "MissingLogpsError",
    "ModelScorer",
    "PreferenceSequences",
    "Problem",
    "ReferenceCache",
    "ReferenceModel",
    "ReferenceSummary",
    "Scorer",
    "TokenScores",
    "TokenSequence",
    "inspect",
    "render_problems",
    "render_summary",
    "score",
    "verify",
]
