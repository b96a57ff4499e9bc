"""One of several processes of a run: `python worker.py FOLDER`, started by test_base.py with torchrun's environment."""

import importlib.util
import json
import sys
from pathlib import Path

import torch

spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)


def main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads(sys.argv[2])
    kit = conftest.Kit(folder, conftest.make_tokenizer())
    trainer = kit.trainer(
        kit.model().double(), kit.pairs(24), kit.pairs(7, seed=1), backend="torch", num_train_epochs=2,
        train_sampling_strategy="sequential", ddp_backend="gloo" if trainer_processes() > 1 else None, **settings,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save({"weights": kit.weights(trainer), "logs": kit.logs(trainer), "eval": metrics}, folder / "result.pt")


def trainer_processes() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    main()
