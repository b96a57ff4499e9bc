"""What a loss keeps beside its batch: the running shift, and metrics of good and of bad responses."""

import json
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.losses import mean_metric
from fastalign.trainers.dpo_loss import ResponseMeter, RunningShift
from fastalign.types import Metric


def rewards(chosen, rejected):
    sides = {"rewards/chosen": chosen, "rewards/rejected": rejected}
    return {name: mean_metric(torch.tensor(values, dtype=torch.float32)) for name, values in sides.items()}


def test_the_shift_is_the_middle_of_two_means():
    shift = RunningShift()
    assert float(shift.value) == 0.0
    shift.add(rewards([1.0, 2.0], [-1.0]))
    shift.add(rewards([], [-4.0]))
    assert float(shift.value) == 0.0  # the step at hand does not count
    shift.finish_step(lambda sums: sums)
    assert float(shift.value) == pytest.approx((1.5 - 2.5) / 2)
    shift.finish_step(lambda sums: sums)  # nothing new
    assert float(shift.value) == pytest.approx((1.5 - 2.5) / 2)


def test_a_side_that_was_never_seen_counts_as_zero():
    shift = RunningShift()
    shift.add(rewards([3.0], []))
    shift.finish_step(lambda sums: sums)
    assert float(shift.value) == 1.5


def test_processes_add_up():
    one, other = rewards([1.0, 2.0], [-1.0]), rewards([6.0], [-5.0])
    whole, share = RunningShift(), RunningShift()
    for part in (one, other):
        whole.add(part)
    whole.finish_step(lambda sums: sums)
    share.add(one)
    theirs = torch.stack([value for metric in other.values() for value in metric]).double()
    share.finish_step(lambda sums: sums + theirs)
    assert float(share.value) == float(whole.value) == pytest.approx((3 - 3) / 2)


def test_a_shift_comes_back_to_the_bit():
    shift, again = RunningShift(), RunningShift()
    shift.add(rewards([0.1, 0.7], [-1 / 3]))
    shift.finish_step(lambda sums: sums)
    again.load_state_dict(json.loads(json.dumps(shift.state_dict())))
    assert float(again.value) == float(shift.value)
    assert again.state_dict() == shift.state_dict()


def test_margins_are_the_difference_of_the_means_of_everything_seen():
    meter = ResponseMeter()
    meter.update(rewards([1.0, 2.0], [0.0]))
    meter.update(rewards([6.0], [1.0]))
    values, _ = meter.values()
    assert values["rewards/margins"] == pytest.approx(3.0 - 0.5)


def test_means_of_nothing_are_left_out():
    meter = ResponseMeter()
    meter.update(rewards([1.0, 2.0], []) | {"loss": Metric(torch.tensor(torch.nan), torch.tensor(1.0))})
    values, _ = meter.values()
    assert values.keys() == {"rewards/chosen", "loss"}
    assert values["loss"] != values["loss"]  # nan is shown


class HostReads(TorchDispatchMode):
    """Reads of a tensor's value on the host, by the file that asks."""

    def __init__(self):
        super().__init__()
        self.files = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.files.append([f.filename for f in traceback.extract_stack() if "/torch/" not in f.filename][-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "kto"}, {"loss_type": "bco"}, {"loss_type": ["sigmoid", "sft"]}, {"ld_alpha": 0.5},
        {"loss_type": "aot"},
        {"sync_ref_model": True, "ref_model_sync_steps": 1}, {"use_weighting": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_reads_no_tensor_on_the_host(kit, settings):
    data = kit.labelled(8) if settings.get("loss_type") in ("kto", "bco") else kit.pairs(8)
    trainer = kit.trainer(kit.model(), data, max_steps=1, **settings)
    trainer.train()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(8)]))
    with HostReads() as reads:
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        trainer.training_step(trainer.model, batch, items)
        trainer.after_step()
    assert reads.files  # the head looks at host tensors, so the counter works
    assert not [file for file in reads.files if any(f"/fastalign/{part}/" in file for part in ("trainers", "models"))]
