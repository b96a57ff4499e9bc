"""One of two processes: `python worker.py FOLDER SETTINGS [KIND]`, started by a test with torchrun's environment.

Without KIND it trains by DPO, with "sft" by SFT, with "pro" by PRO, otherwise a reward model on that kind of judgement.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

from fastalign.models import reward_normalization

spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
kit = conftest.Kit(folder, conftest.make_tokenizer())
kind = sys.argv[3] if len(sys.argv) > 3 else None
if kind == "sft":
    data = kit.sequences(24), kit.sequences(7, seed=1)
    trainer = kit.sft(kit.model().double(), *data, ddp_backend="gloo", **settings)
elif kind == "pro":
    data = kit.lists(24, scores=True), kit.lists(7, seed=1, scores=True)
    trainer = kit.pro(kit.model().double(), *data, ddp_backend="gloo", **settings)
elif kind:
    rewards = conftest.RewardKit(kit)
    data = [rewards.data(kind, n, seed=seed) for n, seed in ((24, 0), (7, 1))]
    trainer = rewards.trainer(rewards.model().double(), *data, ddp_backend="gloo", **settings)
else:
    trainer = kit.trainer(kit.model().double(), kit.pairs(24), kit.pairs(7, seed=1), ddp_backend="gloo", **settings)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    result = {"weights": kit.weights(trainer), "logs": kit.logs(trainer), "eval": metrics}
    if kind not in (None, "sft", "pro"):
        result["normalization"] = tuple(reward_normalization(trainer.model))
    torch.save(result, folder / "result.pt")
