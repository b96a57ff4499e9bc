"""`fastalign ppo` killed in the middle of a phase: resumed, it ends in the same bits as a run that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.cli import main

REWARDS = """
import os, signal

calls = 0

def digits(completions, **columns):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILLED_IN_PHASE", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(sum(map(str.isdigit, text))) - 0.01 * len(text) for text in completions]
"""


@pytest.fixture
def config(settings, tmp_path, monkeypatch) -> Path:
    import yaml

    (tmp_path / "killing_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = {name: value for name, value in settings.items() if name not in ("cache_dir", "dataset_test_split")}
    given |= {
        "reward_funcs": ["killing_rewards:digits"], "response_length": 8, "num_ppo_epochs": 2, "num_mini_batches": 2,
        "max_steps": 5, "save_steps": 2, "normalize_scores": True, "kl_controller": "adaptive", "target_kl": 0.01,
        "kl_horizon": 50, "learning_rate": 0.01, "gradient_checkpointing": True,
    }  # fmt: skip
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_is_uninterrupted(config, tmp_path, settings):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        start = "import sys; from fastalign.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", start, "ppo", "--config", str(config), "--output_dir", str(killed)]
        env = os.environ | {"KILLED_IN_PHASE": "4", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert main(["ppo", "--config", str(config), "--output_dir", str(whole)]) == 0
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, errors[-2000:]
        assert (killed / "checkpoint-2").is_dir()
        assert not (killed / "model.safetensors").exists()
        resumed = ["ppo", "--config", str(config), "--output_dir", str(killed), "--resume_from_checkpoint"]
        assert main(resumed) == 0
    finally:
        torch.set_num_threads(threads)
    for name in ("model.safetensors", "critic/model.safetensors"):
        one, other = load_file(whole / name), load_file(killed / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    first = load_file(Path(settings["model_name_or_path"]) / "model.safetensors")
    assert any(not torch.equal(first[key], one) for key, one in load_file(whole / "model.safetensors").items())
