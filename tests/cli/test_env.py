"""`fastalign env`."""

from __future__ import annotations

import json

import pytest

from fastalign.cli import main
from fastalign.ops import backends


def test_every_backend_is_listed_with_the_reason_it_cannot_run(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, reason in backends.available().items():
        line = next(line for line in lines if line.split()[:1] == [name] and "available" in line)
        assert line.split(maxsplit=1)[1] == ("available" if reason is None else f"unavailable: {reason}")


def test_json(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"] == backends.available()
    assert facts["versions"]["torch"][0].isdigit()
    assert "cores" in facts["hardware"]["CPU"]


@pytest.mark.parametrize("argv", [["--jsn"], ["--json", "yes"], ["all"]])
def test_bad_usage(argv, capsys):
    assert main(["env", *argv]) == 2
    assert "fastalign env: error: " in capsys.readouterr().err
