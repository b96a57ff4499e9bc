"""What must work wherever fastalign is installed; needs neither a checkout nor a compiler nor the network.

    python .ci/smoke.py BACKEND          # cpu where the C++ kernels are to be there, torch where they are not

The tests run it on a fresh wheel, `.ci/release` on a release.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

TRITON_KERNELS = ("row_kernels", "fused_forward", "gae", "segments")


def check_installation() -> None:
    import fastalign

    folder = Path(fastalign.__file__).parent
    assert Path(sys.prefix) in folder.parents, f"fastalign comes from {folder}, not from this environment"
    assert fastalign.__version__ == importlib.metadata.version("fastalign")
    assert (folder / "py.typed").exists()
    assert (folder / "kernels" / "tiles" / "sm_90.json").exists()
    for name in TRITON_KERNELS:
        assert (folder / "kernels" / f"{name}.py").exists()
        if importlib.util.find_spec("triton"):
            importlib.import_module(f"fastalign.kernels.{name}")


def check_backend(backend: str) -> None:
    import torch

    from fastalign.ops import backends

    assert backends.resolve("auto", torch.zeros(1)).name == backend, backends.available()
    if backend == "cpu":
        from fastalign.kernels import cpu_rows

        print("C++ kernels for", cpu_rows.instruction_set())


def check_loss() -> None:
    """Fused loss and gradients against stored logits."""
    import torch

    import fastalign

    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 11, 24), torch.randn(301, 24)
    targets = torch.randint(301, (8, 11))
    targets[:, :3] = fastalign.IGNORE_INDEX
    lengths = (targets != fastalign.IGNORE_INDEX).sum(1)
    ref_logps = -40 * torch.rand(8)
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            loss = fastalign.linear_dpo_loss(h, w, targets, ref_logps=ref_logps).loss
        else:
            per_token = (h @ w.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            logps = torch.where(targets != fastalign.IGNORE_INDEX, per_token, 0).sum(1)
            halves = [*logps.chunk(2), *ref_logps.chunk(2)]
            loss = fastalign.losses.dpo_loss(*halves, chosen_lengths=lengths[:4], rejected_lengths=lengths[4:]).loss
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def run(*words: str) -> str:
    """The `fastalign` command of this environment."""
    command = [str(Path(sys.executable).parent / "fastalign"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)} exits with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def check_command_line(backend: str) -> None:
    assert "dpo" in run("--help")
    assert run("--version").split()[1] == importlib.metadata.version("fastalign")
    reason = json.loads(run("env", "--json"))["backends"]["cpu"]
    assert (reason is None) == (backend == "cpu"), reason
    if reason is not None:
        assert "\n" not in reason
        assert "compiler" in reason


def check_training() -> None:
    """Two steps of DPO, from files to a saved model."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        letters = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
        letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>", pad_token="<pad>")
        tokenizer.save_pretrained(folder / "model")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
        rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n} or so"} for n in range(8)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl",
            "output_dir": folder / "out", "cache_dir": folder / "cache", "per_device_train_batch_size": 4,
            "max_steps": 2, "logging_steps": 1, "report_to": "none",
        }  # fmt: skip
        run(
            "dpo",
            "--use_cpu",
            "--disable_tqdm",
            *(word for key, value in settings.items() for word in (f"--{key}", str(value))),
        )
        state = json.loads((folder / "out/trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert len(losses) == 2
        assert abs(losses[0] - math.log(2)) < 1e-3, "a policy that is its own reference has a loss of log 2"
        assert (folder / "out/model.safetensors").exists()


def main(backend: str) -> None:
    check_installation()
    check_backend(backend)
    check_loss()
    check_command_line(backend)
    check_training()
    print("fastalign", importlib.metadata.version("fastalign"), "works, on the", backend, "backend")


if __name__ == "__main__":
    main(sys.argv[1])
