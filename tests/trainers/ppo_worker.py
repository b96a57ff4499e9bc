"""One of two processes: `python ppo_worker.py FOLDER RUNS`, started by test_ppo_processes.py as torchrun would.

RUNS is a JSON list of settings, trained one after the other.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
here = importlib.util.spec_from_file_location("runs", Path(__file__).with_name("test_ppo_processes.py"))
runs = importlib.util.module_from_spec(here)
here.loader.exec_module(runs)

folder = Path(sys.argv[1])
results = []
for index, settings in enumerate(json.loads(sys.argv[2])):
    kit = conftest.Kit(folder / str(index), conftest.make_tokenizer())
    results.append(runs.train(kit, ddp_backend="gloo", **settings))
torch.save(results, folder / f"rank_{runs.rank()}.pt")
