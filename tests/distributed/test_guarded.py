"""A step that is bad in one of two processes is bad in both, and the process and its rows are written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from fastalign.trainers.guards import RECORD, BadStepError

HERE = Path(__file__)
POISON, STEP, PER_STEP = 60, 2, 4  # a token of one row, which is of the third step of four rows
BAD_ROW = {0: 100 + PER_STEP * STEP, 1: 100 + PER_STEP * STEP + PER_STEP // 2}  # by the process that gets it

pytestmark = pytest.mark.long


def sequences(bad: int, left_out: bool) -> Dataset:
    rows = []
    for row in range(100, 100 + 5 * PER_STEP):
        ids = [3 + row % 7, POISON if row == bad else 30, 10 + row % 11, 20 + row % 13]
        rows.append({"input_ids": ids, "completion_mask": [False, True, True, True], "row": row})
    kept = [row for i, row in enumerate(rows) if not left_out or i // PER_STEP != STEP]
    return Dataset.from_list(kept)


def guard(kit, conftest, folder, process, action, left_out=False, **settings):
    """What a process comes to when one of them alone has the nan."""
    kit.folder = Path(folder)
    bad = BAD_ROW[process]
    trainer = kit.sft(
        train=sequences(bad, left_out), num_train_epochs=1, train_sampling_strategy="sequential", optim="adamw_torch",
        per_device_train_batch_size=PER_STEP // 2, max_grad_norm=1.0, weight_decay=0.1, on_bad_step=action,
        lr_scheduler_type="constant", ddp_backend="gloo", micro_batch_tokens=4, **settings,
    )  # fmt: skip
    weight, said = trainer.model.get_input_embeddings().weight, ""
    with torch.no_grad():
        weight[POISON] = torch.nan
    try:
        trainer.train()
    except BadStepError as error:
        said = str(error)
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in trainer.model.named_parameters()}
    return {"said": said, "step": trainer.state.global_step, "skipped": trainer.guard.skipped,
            "weights": {name: p.detach().clone() for name, p in weights.items()}}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"fsdp": True}], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("process", [0, 1])
def test_all_processes_take_the_same_decision(kit, processes, tmp_path, settings, process):
    def call(name, action, **given):
        return HERE, "guard", {"folder": tmp_path / name, "process": process, "action": action, **given, **settings}

    calls = [call("stop", "stop"), call("skip", "skip"), call("without", "skip", left_out=True)]
    for stopped, skipped, without in processes.results(calls):
        row = BAD_ROW[process]
        where = " in process 1" if process else ""
        assert stopped["said"].startswith(f"step {STEP + 1}: the loss is nan; rows {row}{where};")
        assert (stopped["step"], stopped["skipped"]) == (STEP, 0)
        assert (skipped["step"], skipped["skipped"], skipped["said"]) == (5, 1, "")
        assert (without["step"], without["skipped"]) == (4, 0)
        kit.assert_same(skipped["weights"], without["weights"], rtol=0, atol=0, equal_nan=True)
    for name in ("stop", "skip"):
        (bad,) = [json.loads(line) for line in (tmp_path / name / "out" / RECORD).read_text().splitlines()]
        first = 100 + PER_STEP * STEP
        assert bad["rows"] == list(range(first, first + PER_STEP))
        assert bad["suspects"] == [row]
        assert bad["processes"] == {str(process): [row]}
