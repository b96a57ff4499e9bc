"""What torchrun starts in test_stopping.py: `stopping_worker.py FOLDER ARGUMENTS`, a run that is stopped."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch


def load(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


torch.set_num_threads(1)
here, folder = Path(__file__).parent, Path(sys.argv[1])
kits, runs = load(here.parent / "trainers/conftest.py"), load(here / "test_stopping.py")
code = 0
try:
    runs.run(kits.Kit(folder, kits.make_tokenizer()), kits, **json.loads(sys.argv[2]))
except KeyboardInterrupt:
    code = 130
except SystemExit as error:
    code = error.code
(folder / f"exit_{os.environ['RANK']}").write_text(f"{code} {os.getpid()}")
sys.exit(code)
