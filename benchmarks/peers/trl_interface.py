"""Write the names that TRL's trainers and configs take, with their defaults, as JSON.

    <python with trl> benchmarks/peers/trl_interface.py --output tests/trainers/golden/trl_interface.json

Runs in an environment of its own (TRL is no dependency of fastalign). Configs: the fields that TRL declares itself,
in its classes above transformers' TrainingArguments. Constructors: parameters in their order.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import platform
from pathlib import Path
from typing import Any

CONFIGS = ("DPOConfig", "RewardConfig", "SFTConfig")
TRAINERS = ("DPOTrainer", "RewardTrainer", "SFTTrainer")


def default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def own_fields(config_class: type) -> dict[str, Any]:
    """name -> default of the fields that TRL's classes declare or redeclare."""
    from transformers import TrainingArguments

    names: set[str] = set()
    for parent in config_class.__mro__[: config_class.__mro__.index(TrainingArguments)]:
        names |= inspect.get_annotations(parent).keys()
    return {field.name: default(field) for field in dataclasses.fields(config_class) if field.name in names}


def interface() -> dict[str, Any]:
    import transformers
    import trl

    return {
        "provenance": {
            "script": "benchmarks/peers/trl_interface.py", "trl": trl.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
        },
        "configs": {name: own_fields(getattr(trl, name)) for name in CONFIGS},
        "constructors": {
            name: list(inspect.signature(getattr(trl, name).__init__).parameters)[1:] for name in TRAINERS
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    output.write_text(json.dumps(interface(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
