"""One of several processes: `python sharded_worker.py FOLDER SETTINGS NAME ...`; runs of test_sharded.py."""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState


def load(name: str, file: Path):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


here = Path(__file__).parent
conftest, runs = load("kit", here.parent / "trainers/conftest.py"), load("runs", here / "test_sharded.py")
folder, given, names = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
if "deepspeed" in given:  # which accelerate starts on accelerators alone
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
results = {}
for name in names:
    kit = conftest.Kit(folder / name, conftest.make_tokenizer())
    what, settings = runs.SCENES.get(name) or (runs.train, (runs.RUNS | runs.MORE | runs.FOUR | runs.ZERO)[name])
    results[name] = what(kit, conftest, **given, **settings)
torch.save(results, folder / f"rank_{runs.rank()}.pt")
