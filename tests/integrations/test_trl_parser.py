"""A script written for TRL, by TRL's trainer and by fastalign's: only imports differ. Needs TRL, see test_trl.py."""

import json
import os
import random
import subprocess
import sys

import pytest

pytestmark = pytest.mark.peers

OURS = """from fastalign import DPOConfig, DPOTrainer
from fastalign.integrations.trl import TrlParser
"""
THEIRS = "from trl import DPOConfig, DPOTrainer, TrlParser\n"


@pytest.fixture
def workplace(kit, tmp_path):
    """A model, its tokenizer and a data set on disk."""
    kit.make_model().save_pretrained(tmp_path / "model")
    kit.make_tokenizer().save_pretrained(tmp_path / "model")
    rng = random.Random(0)

    def text():
        return "".join(f" {rng.choice(kit.WORDS)}" for _ in range(rng.randrange(3, 12)))

    (tmp_path / "data").mkdir()
    for split, rows in (("train", 16), ("test", 8)):
        lines = [json.dumps({name: text() for name in ("prompt", "chosen", "rejected")}) for _ in range(rows)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(script, folder, output, *flags):
    path = folder / f"{output}.py"
    path.write_text(script)
    words = [
        "--model_name_or_path", "model", "--dataset_name", "data", "--output_dir", output, "--learning_rate", "0.05",
        "--optim", "sgd", "--max_steps", "4", "--logging_steps", "1", "--use_cpu", "--bf16", "false", "--report_to",
        "none", "--per_device_train_batch_size", "4", "--eval_strategy", "steps", "--eval_steps", "4", "--seed", "1",
        *flags,
    ]  # fmt: skip
    environment = os.environ | {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(path), *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / output / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss_type", "sigmoid", "ipo", "--loss_weights", "1.0", "0.5"],
        ["--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--learning_rate", "0.5"],
    ],
    ids=["list of losses", "lora"],
)
def test_only_the_imports_differ(repository, workplace, flags):
    script = (repository / "examples/trl_script.py").read_text()
    assert OURS in script
    ours = run(script, workplace, "ours", *flags)
    theirs = run(script.replace(OURS, THEIRS), workplace, "theirs", *flags)
    compared = 0
    for own, log in zip(ours, theirs, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "entropy", "eval_loss", "eval_rewards/accuracies"):
            if name in log:
                compared += 1
                assert own[name] == pytest.approx(log[name], rel=1e-4, abs=2e-5), (name, own["step"])
    assert compared == 4 * 4 + 2
    assert theirs[0]["loss"] != pytest.approx(theirs[3]["loss"], rel=1e-3)


def test_flags_that_both_have_go_to_trls_dataclasses(kit, tmp_path):
    from fastalign import DPOConfig, SFTConfig
    from fastalign.integrations.trl import TrlParser

    for config in (DPOConfig, SFTConfig):
        parser = TrlParser((kit.trl.ScriptArguments, config, kit.trl.ModelConfig))
        script_args, args, model_args = parser.parse_args_and_config(
            ["--dataset_name", "rows", "--lora_r", "7", "--use_peft", "--output_dir", str(tmp_path), "--use_cpu",
             "--learning_rate", "3e-5", "--pad_to_multiple_of", "8"]
        )  # fmt: skip
        assert (script_args.dataset_name, model_args.lora_r, model_args.use_peft) == ("rows", 7, True)
        assert type(args) is config
        assert (args.dataset_name, args.lora_r, args.use_peft) == (None, 16, False)
        assert (args.learning_rate, args.pad_to_multiple_of) == (3e-5, 8)
        assert args.loss_type == config(str(tmp_path), use_cpu=True).loss_type
        parser.format_help()
    assert DPOConfig(str(tmp_path), dataset_name="rows", use_cpu=True).dataset_name == "rows"  # untouched by all that


def test_a_config_file(kit, tmp_path):
    from fastalign import DPOConfig
    from fastalign.integrations.trl import TrlParser

    file = tmp_path / "run.yaml"
    file.write_text(f"dataset_name: rows\nloss_type: [sigmoid, sft]\noutput_dir: {tmp_path}\nuse_cpu: true\n")
    script_args, args = TrlParser((kit.trl.ScriptArguments, DPOConfig)).parse_args_and_config(["--config", str(file)])
    assert script_args.dataset_name == "rows"
    assert args.loss_type == ["sigmoid", "sft"]
