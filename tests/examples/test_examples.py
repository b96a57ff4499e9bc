"""The examples, run as the scripts that they are. Those of libraries that are not installed skip.

TRL's run where TRL is (see tests/integrations/test_trl.py), as do Lightning's and bitsandbytes'.
"""

import re
import time

import pytest

LOG_2 = 0.6931


@pytest.fixture
def run(launch, repository, tmp_path):
    """run(name, *flags): standard output of an example."""

    def run(name, *flags):
        environment = {
            "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        start = time.monotonic()
        script = repository / "examples" / name
        (output,) = launch(script, *flags, processes=1, folder=tmp_path, environment=environment)
        assert time.monotonic() - start < 300  # under a minute on a machine that does nothing else
        return output

    return run


def numbers(pattern, text):
    return [float(found) for found in re.findall(pattern + r" ([-+.\de]+)", text)]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("pytorch_loop.py", []),
        ("lora.py", []),
        ("lora.py", ["--on_head", "--tied"]),
    ],
    ids=["pytorch_loop", "lora", "lora_on_tied_head"],
)
def test_loops_learn(run, name, flags):
    text = run(name, "--steps", "45", *flags)
    losses = numbers("loss", text)
    assert losses[0] == pytest.approx(LOG_2, abs=1e-3)  # the policy is its reference
    assert losses[-1] < 0.5
    assert numbers("held-out accuracy", text)[0] > 0.7


def test_hugging_faces_trainer(run):
    text = run("hf_trainer.py", "--steps", "45")
    assert "loss 0.6931 -> 0." in text
    assert numbers("held-out accuracy", text)[0] > 0.7


def test_torch_compile(run):
    """fullgraph=True: it would fail at a graph break."""
    text = run("compile_step.py", "--backend", "aot_eager", "--steps", "6")
    compiled, plain = numbers("compiled loss", text)[0], numbers("plain", text)[0]
    assert compiled == pytest.approx(plain, abs=1e-6)
    assert numbers(": loss", text)[0] < LOG_2


def test_lightning(run):
    pytest.importorskip("lightning")
    text = run("lightning_dpo.py", "--steps", "45")
    assert numbers("step 0: loss", text)[0] == pytest.approx(LOG_2, abs=1e-3)
    assert numbers("held-out accuracy", text)[0] > 0.7


def test_4_bit_base(run):
    pytest.importorskip("bitsandbytes")
    text = run("qlora_4bit.py", "--steps", "20")
    assert "14 layers in 4 bits, head in torch.float32" in text
    first, last = (float(value) for value in re.search(r"loss ([\d.]+) -> ([\d.]+)", text).groups())
    assert last < first


@pytest.mark.peers
def test_trl_with_one_call(run):
    pytest.importorskip("trl")
    text = run("trl_dropin.py", "--steps", "6")
    assert numbers("largest difference", text)[0] < 1e-4


def test_every_example_is_run(repository):
    here = (repository / "tests/examples/test_examples.py").read_text()
    here += (repository / "tests/integrations/test_trl_parser.py").read_text()
    for script in (repository / "examples").glob("*.py"):
        assert script.name == "shop.py" or script.name in here, f"{script.name} is run by no test"
