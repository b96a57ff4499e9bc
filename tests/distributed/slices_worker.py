"""One of several processes: `python slices_worker.py FOLDER`, started by test_vocabulary_parallel.py."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("test_vocabulary_parallel.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

dist.init_process_group("gloo")
results = {name: cases.scored(dist.group.WORLD, *case) for name, case in cases.CASES.items()}
results["refused"] = cases.refused(dist.group.WORLD)
torch.save(results, Path(sys.argv[1]) / f"rank_{os.environ['RANK']}.pt")
dist.destroy_process_group()
