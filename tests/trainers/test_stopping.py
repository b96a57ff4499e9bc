"""SIGTERM and Ctrl-C: once, the step is finished and saved; twice, at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from transformers import TrainerCallback

from fastalign.trainers.checkpoint_files import checkpoints
from fastalign.trainers.stopping import StopRequest, StopWhenAsked, Terminated

pytestmark = pytest.mark.usefixtures("python_signals")


class SignalAt(TrainerCallback):
    """Sends this process signals at an event of a step."""

    def __init__(self, event: str, step: int, *signals: int) -> None:
        self.step, self.signals = step, signals
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


def make(kit, callback=None, **settings):
    defaults = {"save_strategy": "steps", "save_steps": 100, "max_steps": 4, "optim": "adamw_torch"}
    callbacks = None if callback is None else [callback]
    return kit.trainer(kit.model(), kit.pairs(16), kit.pairs(8, seed=1), callbacks=callbacks, **(defaults | settings))


def saved(kit) -> list[str]:
    return [folder.name for folder in checkpoints(kit.folder / "out")]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "Ctrl-C"]
)
def test_the_step_is_finished_and_saved(kit, capfd, number, raised):
    trainer = make(kit, SignalAt("on_step_begin", 1, number))
    with pytest.raises(raised) as caught:
        trainer.train()
    if raised is Terminated:
        assert caught.value.code == 143
    assert trainer.state.global_step == 2
    assert saved(kit) == ["checkpoint-2"]
    assert "stopping after this step and its checkpoint" in capfd.readouterr().err
    resumed, whole = make(kit), make(kit, output_dir=str(kit.folder / "whole"))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    kit.assert_same(kit.weights(resumed), kit.weights(whole), rtol=0, atol=0)


def test_the_second_is_obeyed_at_once(kit):
    trainer = make(kit, SignalAt("on_step_begin", 1, signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert saved(kit) == []
    trainer = make(kit, SignalAt("on_step_begin", 1, signal.SIGINT, signal.SIGTERM))
    with pytest.raises(Terminated):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_due_evaluation_is_left_out_and_nothing_is_saved_twice(kit, monkeypatch):
    trainer = make(
        kit, SignalAt("on_step_begin", 3, signal.SIGTERM), eval_strategy="epoch", save_strategy="epoch", max_steps=-1,
        num_train_epochs=3,
    )  # fmt: skip
    steps = []
    original = trainer._save_checkpoint
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *a: (steps.append(trainer.state.global_step), original(*a)))
    with pytest.raises(Terminated):
        trainer.train()
    assert trainer.state.global_step == 4  # the end of an epoch
    assert steps == [4]
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_in_an_evaluation_it_is_saved_after_it(kit):
    trainer = make(kit, SignalAt("on_prediction_step", 2, signal.SIGTERM), eval_strategy="steps", eval_steps=1)
    with pytest.raises(Terminated):
        trainer.train()
    assert trainer.state.global_step == 2
    assert saved(kit) == ["checkpoint-2"]


def test_without_checkpoints_none_is_saved(kit):
    trainer = make(kit, SignalAt("on_step_begin", 1, signal.SIGTERM), save_strategy="no")
    with pytest.raises(Terminated):
        trainer.train()
    assert trainer.state.global_step == 2
    assert saved(kit) == []


def test_handlers_are_put_back_and_those_of_others_left_alone(kit):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    seen, inside = [], []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            inside.append(signal.getsignal(signal.SIGTERM))

    trainer = make(kit, Look(), max_steps=1)
    trainer.train()
    assert inside[0] not in before.values()
    assert {number: signal.getsignal(number) for number in before} == before

    def own(number, frame):
        seen.append(number)

    signal.signal(signal.SIGTERM, own)
    try:
        trainer = make(kit, SignalAt("on_step_begin", 1, signal.SIGTERM))
        trainer.train()  # whoever handles SIGTERM goes on doing so
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
    assert seen == [signal.SIGTERM]
    assert trainer.state.global_step == 4


def test_the_signal_of_one_process_stops_all():
    """The others are told, by the exchange that `agreed` is."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    args = TrainingArguments(use_cpu=True, report_to="none")
    stopping, control = StopWhenAsked(lambda own: signal.SIGTERM), TrainerControl()
    stopping.on_step_end(args, TrainerState(), control)
    assert control.should_training_stop
    assert control.should_save
    assert stopping.stopped_by == signal.SIGTERM
    stopping.on_epoch_end(args, TrainerState(), control)
    assert not control.should_save


def test_other_threads_cannot_listen():
    before, request = signal.getsignal(signal.SIGTERM), StopRequest()
    thread = threading.Thread(target=request.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
