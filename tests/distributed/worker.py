"""One of several processes, forked by conftest.Processes. Set beforehand: place (its environment), folder, calls.

Each call is (file, name of a function in it, its arguments beside kit and conftest); what they give is saved.
"""

import importlib.util
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import transformers as tf
from datasets import disable_progress_bars

os.environ.update(place)  # noqa: F821
rank, folder = os.environ["RANK"], Path(folder)  # noqa: F821
os.dup2(os.open(folder / f"errors_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
os.dup2(2, 1)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
torch.set_num_threads(1)
tf.utils.logging.disable_progress_bar()
disable_progress_bars()


def load(file: Path):
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


try:
    kits = load(Path(__file__).parents[1] / "trainers/conftest.py")
    results = []
    for number, (file, name, arguments) in enumerate(calls):  # noqa: F821
        kit = kits.Kit(folder / str(number), kits.make_tokenizer())
        results.append(getattr(load(file), name)(kit, kits, **arguments))
    torch.save(results, folder / f"rank_{rank}.pt")
except KeyboardInterrupt:
    sys.exit(130)  # as the command line does
except Exception:
    traceback.print_exc()
    sys.exit(1)
