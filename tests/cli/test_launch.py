"""`accelerate launch` with a configuration of examples/accelerate, in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_a_sharded_run_by_accelerate_launch(repository, run_yaml, settings):
    """run_yaml says use_cpu, where accelerate by itself would not shard."""
    tools = Path(sys.executable).parent
    command = [
        tools / "accelerate", "launch", "--config_file", repository / "examples/accelerate/fsdp2.yaml",
        "--num_processes", "2", "--main_process_port", "0", tools / "fastalign", "dpo", "--config", run_yaml,
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    out = Path(str(settings["output_dir"]))
    assert (out / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()  # what a sharded run alone writes
    assert (out / "model.safetensors").is_file()
    assert done.stdout.count("2 steps; model and configuration are in") == 1  # said by one process
