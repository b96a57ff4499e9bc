"""Rows to validated pairs to tokens to batches. The one place that shifts labels."""

from fastalign.data.collator import PreferenceCollator
from fastalign.data.preferences import PreferenceData, prepare_preferences
from fastalign.data.report import BadRow, BadRowsError, DataReport, Reason
from fastalign.data.sources import load_rows

__all__ = [
    "BadRow",
    "BadRowsError",
    "DataReport",
    "PreferenceCollator",
    "PreferenceData",
    "Reason",
    "load_rows",
    "prepare_preferences",
]
