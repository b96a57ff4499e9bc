"""`accelerate launch` with a configuration of examples/accelerate, in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_a_cache_and_a_sharded_run_by_accelerate_launch(repository, run_yaml, settings):
    """run_yaml says use_cpu, where accelerate by itself would not shard."""
    tools = Path(sys.executable).parent
    command = [
        tools / "accelerate", "launch", "--config_file", repository / "examples/accelerate/fsdp2.yaml",
        "--num_processes", "2", "--main_process_port", "0", tools / "fastalign",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for action, known in (("cache build", "0 rows found, "), ("dpo", "20 found, 0 computed")):
        line = [*map(str, command), *action.split(), "--config", str(run_yaml)]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert known in done.stdout
    out = Path(str(settings["output_dir"]))
    assert (out / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()  # what a sharded run alone writes
    assert (out / "model.safetensors").is_file()
    assert done.stdout.count("2 steps; model and configuration are in") == 1  # said by one process
