"""One of two processes: `python worker.py FOLDER SETTINGS`, started by test_base.py with torchrun's environment."""

import importlib.util
import json
import sys
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
kit = conftest.Kit(folder, conftest.make_tokenizer())
trainer = kit.trainer(kit.model().double(), kit.pairs(24), kit.pairs(7, seed=1), ddp_backend="gloo", **settings)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    torch.save({"weights": kit.weights(trainer), "logs": kit.logs(trainer), "eval": metrics}, folder / "result.pt")
