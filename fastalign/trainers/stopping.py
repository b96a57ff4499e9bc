"""SIGTERM and Ctrl-C while a model trains: the step at hand is finished and saved, then the run stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

# the handlers that ours may stand in for: another one knows better what a signal means here
_ORDINARY = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Terminated(SystemExit):
    """SIGTERM was obeyed. The exit status is 143, as of a process that the signal killed."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """The first SIGTERM or Ctrl-C is remembered, the second obeyed at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._former: dict[int, Any] = {}

    def listen(self) -> None:
        """Until `leave`. In the main thread alone, and only for signals that nothing else handles."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, ordinary in _ORDINARY.items():
            if number not in self._former and signal.getsignal(number) is ordinary:
                self._former[number] = signal.signal(number, self._remember)

    def leave(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            stop(number)
        self.signal = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        message = f"{name}: stopping after this step and its checkpoint; a second one stops at once\n"
        os.write(2, message.encode())  # a logger might be in the middle of a line


def stop(number: int) -> None:
    """What the signal means by itself: raises KeyboardInterrupt or Terminated."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


class StopWhenAsked(TrainerCallback):
    """Ends training, with a checkpoint unless save_strategy is "no", after the step in which any process was asked to.

    An evaluation that is due then is left out: whoever sends SIGTERM waits some seconds only. agreed: from the signal
    of this process, or None, to that of all processes; called once a step by each.
    """

    def __init__(self, agreed: Callable[[int | None], int | None]) -> None:
        self.request = StopRequest()
        self.stopped_by: int | None = None
        self._agreed = agreed
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.request.signal = self.stopped_by = None
        self.request.listen()
        self._training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._look(args, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training:
            self._look(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_by is not None:  # all is saved
            control.should_save = control.should_evaluate = False
        else:
            self._look(args, control)

    def _look(self, args: TrainingArguments, control: TrainerControl) -> None:
        if self.stopped_by is None:
            self.stopped_by = self._agreed(self.request.signal)
        if self.stopped_by is not None:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO
            control.should_evaluate = False
