"""One of two processes: `python dpo_worker.py FOLDER`, started by test_dpo_processes.py as torchrun would.

The runs of that file, one after the other.
"""

import importlib.util
import sys
from pathlib import Path

import torch


def load(name: str, file: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conftest, runs = load("kit", "conftest.py"), load("runs", "test_dpo_processes.py")
folder = Path(sys.argv[1])
results = []
for index, settings in enumerate(runs.RUNS.values()):
    kit = conftest.Kit(folder / str(index), conftest.make_tokenizer())
    results.append(runs.train(kit, ddp_backend="gloo", **settings))
torch.save(results, folder / f"rank_{runs.rank()}.pt")
