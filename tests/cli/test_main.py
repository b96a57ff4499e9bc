"""Dispatch, exit statuses and start-up of the `fastalign` command."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from fastalign import cli
from fastalign.cli.flags import Stopped


@pytest.fixture
def command(monkeypatch):
    """Install a function as the command `dpo`."""

    def install(run) -> None:
        module = types.ModuleType("fastalign.cli.dpo")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fastalign.cli.dpo", module)

    return install


def raising(error: BaseException):
    def run(argv: list[str]) -> None:
        raise error

    return run


def test_a_command_gets_its_arguments_and_success_is_0(command):
    seen = []
    command(seen.append)
    assert cli.main(["dpo", "--beta", "0.2", "--traceback"]) == 0
    assert seen == [["--beta", "0.2"]]


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("beta must be positive, got -1"), 2, "fastalign dpo: error: beta must be positive, got -1"),
        (FileNotFoundError(2, "No such file", "x.jsonl"), 2, "fastalign dpo: error: [Errno 2] No such file: 'x.jsonl'"),
        (
            OutOfMemoryError("tried to allocate 2 GiB"),
            1,
            "fastalign dpo: failed: out of memory: tried to allocate 2 GiB",
        ),
        (KeyboardInterrupt(), 130, "fastalign dpo: interrupted"),
        (Stopped("at step 3"), 143, "fastalign dpo: stopped by SIGTERM; at step 3"),
        (OSError(28, "No space left", "out"), 1, "fastalign dpo: failed: [Errno 28] No space left: 'out'"),
    ],
)
def test_expected_errors_are_one_line(command, capsys, error, status, line):
    command(raising(error))
    assert cli.main(["dpo"]) == status
    assert capsys.readouterr().err == line + "\n"


def test_an_unexpected_failure_shows_its_traceback(command, capsys):
    command(raising(RuntimeError("worker died")))
    assert cli.main(["dpo"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("RuntimeError: worker died\nfastalign dpo: failed: RuntimeError\n")


def test_traceback_flag_shows_the_traceback_of_a_user_error(command, capsys):
    command(raising(ValueError("bad row 3")))
    assert cli.main(["--traceback", "dpo"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("fastalign dpo: error: bad row 3\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a command is needed: demo, sft, reward, dpo, "),
        (["dop"], "unknown command 'dop' (did you mean dpo?)"),
        (["--beta", "0.1"], "unknown command '--beta'"),
    ],
)
def test_bad_usage_is_2(capsys, argv, message):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastalign 0")


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["dop"], 2),
        (["dpo", "--bata", "0.2"], 2),
        (["cache", "biuld"], 2),
        (["demo", "--sede", "1"], 2),
    ],
)
def test_help_and_typos_are_answered_before_torch_is_imported(argv, status):
    code = (
        "import sys; from fastalign.cli import main; status = main(sys.argv[1:]);"
        " print(status, [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code, *argv], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"{status} []", result.stderr
    if status == 2:
        assert "did you mean" in result.stderr
