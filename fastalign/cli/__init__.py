"""The `fastalign` command.

Exit status: 0; 2 for bad usage or input (one line on stderr, no traceback); 1 for a failure; 130 after Ctrl-C;
143 after SIGTERM. The first of these two lets a training step finish and be saved, the second is obeyed at once.
A command is a module with `run(argv)`, imported when it is asked for, so that help and typos are answered at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from fastalign.cli.flags import Failure, Stopped, UsageError, suggestion

COMMANDS = {
    "demo": "train a tiny model on a built-in language: SFT, DPO, length-penalised DPO, a reward model, PPO",
    "sft": "fine-tune a model on text, conversations, or completions of prompts",
    "reward": "train a reward model on comparisons, rankings or labels",
    "dpo": "train a policy on preference pairs",
    "pro": "train a policy on ranked responses",
    "ppo": "train a policy on its own completions, scored by reward models or functions",
    "cache": "build, inspect or verify a cache of reference log-probs",
    "plan": "predict the memory and work of a training step from its settings, before it runs",
    "bench": "measure a few training steps beside what was planned for them; tune the GPU kernels",
    "doctor": "check the identities that must hold on a run's own model, data and backends, before it starts",
    "env": "print versions, devices and backends, and why one is unavailable",
}

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

USAGE = "usage: fastalign COMMAND [--help] [--NAME VALUE ...]\n"


def help_text() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        f"{USAGE}\nPreference alignment of language models without the logits.\n\ncommands:\n{commands}\n\n"
        "`fastalign COMMAND --help` describes a command; `fastalign --version` prints the version.\n"
        "Every command takes --traceback, which shows the Python traceback of an error.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv[1:] by default); returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    command = argv[0] if argv and argv[0] in COMMANDS else ""
    try:
        _dispatch(command, argv)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        return _report(command, f"interrupted{'; ' if str(interrupt) else ''}{interrupt}", 130, show_traceback)
    except Stopped as stopped:
        return _report(command, f"stopped by SIGTERM; {stopped}", 143, show_traceback)
    except Failure as failure:
        return _report(command, f"failed: {failure}", 1, show_traceback)
    except BrokenPipeError:  # the reader of our output went away: `fastalign env | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        return _report(command, f"error: {error}", 2, show_traceback)
    except OSError as error:  # a full disk, say
        return _report(command, f"failed: {error}", 1, show_traceback)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
            return _report(command, f"failed: out of memory: {error}", 1, show_traceback)
        traceback.print_exc()
        return _report(command, f"failed: {type(error).__name__}", 1, False)


def _dispatch(command: str, argv: list[str]) -> None:
    if command:
        importlib.import_module(f"fastalign.cli.{command}").run(argv[1:])
    elif argv in (["-h"], ["--help"]):
        print(help_text(), end="")
    elif argv == ["--version"]:
        from fastalign import __version__

        print(f"fastalign {__version__}")
    elif not argv:
        raise UsageError(f"a command is needed: {', '.join(COMMANDS)}; see `fastalign --help`")
    else:
        raise UsageError(f"unknown command {argv[0]!r}{suggestion(argv[0], COMMANDS)}; see `fastalign --help`")


def _report(command: str, message: str, status: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    message = message.translate(_CONTROL)  # it may quote a file or data
    print(f"fastalign {command}: {message}" if command else f"fastalign: {message}", file=sys.stderr)
    return status
