"""One of several processes: `python fsdp_worker.py FOLDER NAME ...`, started by test_fsdp.py; its runs, one by one."""

import importlib.util
import sys
from pathlib import Path

import torch


def load(name: str, file: Path):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


here = Path(__file__).parent
conftest, runs = load("kit", here.parent / "trainers/conftest.py"), load("runs", here / "test_fsdp.py")
folder, names = Path(sys.argv[1]), sys.argv[2:]
results = {}
for name in names:
    kit = conftest.Kit(folder / name, conftest.make_tokenizer())
    what, settings = runs.SCENES.get(name) or (runs.train, (runs.RUNS | runs.FOUR)[name])
    results[name] = what(kit, conftest, fsdp=True, ddp_backend="gloo", **settings)
torch.save(results, folder / f"rank_{runs.rank()}.pt")
