"""Rows to validated pairs to tokens to batches. The one place that shifts labels."""

from fastalign.data.collator import CompletionCollator, PreferenceCollator
from fastalign.data.completions import prepare_completions
from fastalign.data.conversions import PAIRINGS, lists_to_pairs, pairs_to_lists
from fastalign.data.formats import FORMATS
from fastalign.data.judged import prepare_labelled, prepare_lists
from fastalign.data.judgements import LABEL_TYPES
from fastalign.data.length import ON_LONG_PROMPT, TRUNCATION_MODES
from fastalign.data.list_collator import ListCollator
from fastalign.data.preferences import ON_BAD_ROW, PreferenceData, prepare_preferences
from fastalign.data.prefixes import prefix_lengths
from fastalign.data.preparation import PreparedData
from fastalign.data.prompts import PromptColumns, PromptData, prepare_prompts
from fastalign.data.report import BadRow, BadRowsError, DataReport, Reason
from fastalign.data.reward_collator import RewardCollator
from fastalign.data.sources import load_rows
from fastalign.data.unpaired import UnpairedCollator, unpair, with_mismatched

__all__ = [
    "FORMATS",
    "LABEL_TYPES",
    "ON_BAD_ROW",
    "ON_LONG_PROMPT",
    "PAIRINGS",
    "TRUNCATION_MODES",
    "BadRow",
    "BadRowsError",
    "CompletionCollator",
    "DataReport",
    "ListCollator",
    "PreferenceCollator",
    "PreferenceData",
    "PreparedData",
    "PromptColumns",
    "PromptData",
    "Reason",
    "RewardCollator",
    "UnpairedCollator",
    "lists_to_pairs",
    "load_rows",
    "pairs_to_lists",
    "prefix_lengths",
    "prepare_completions",
    "prepare_labelled",
    "prepare_lists",
    "prepare_preferences",
    "prepare_prompts",
    "unpair",
    "with_mismatched",
]
