"""Identities that must hold on a user's own model, data and backends, checked before a run: `fastalign doctor`."""

from fastalign.doctor.examination import examine
from fastalign.doctor.findings import FAILED, OK, SKIPPED, Finding, render
from fastalign.doctor.head import HeadProblem, examine_head

__all__ = ["FAILED", "OK", "SKIPPED", "Finding", "HeadProblem", "examine", "examine_head", "render"]
