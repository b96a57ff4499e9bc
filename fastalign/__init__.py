"""fastalign: log-probs, losses and gradients of language models without ever holding a [tokens, vocabulary] matrix.

The public names are resolved when they are first used (PEP 562), so `import fastalign` is fast and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastalign import losses, ops
    from fastalign.integrations import patch, patch_trl, unpatch
    from fastalign.linear import (
        linear_cross_entropy,
        linear_dpo_loss,
        linear_kto_loss,
        linear_ppo_loss,
        linear_pro_loss,
    )
    from fastalign.ops.linear_logps import linear_logps
    from fastalign.ops.linear_loss import linear_loss
    from fastalign.ops.sequences import sequence_logps
    from fastalign.reference import ReferenceCache
    from fastalign.trainers import (
        DPOConfig,
        DPOTrainer,
        PPOConfig,
        PPOTrainer,
        PROConfig,
        PROTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )
    from fastalign.types import IGNORE_INDEX, LinearLogps, LossOutput, Metric

    __version__: str

__all__ = [
    "IGNORE_INDEX",
    "DPOConfig",
    "DPOTrainer",
    "LinearLogps",
    "LossOutput",
    "Metric",
    "PPOConfig",
    "PPOTrainer",
    "PROConfig",
    "PROTrainer",
    "ReferenceCache",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_logps",
    "linear_loss",
    "linear_ppo_loss",
    "linear_pro_loss",
    "losses",
    "ops",
    "patch",
    "patch_trl",
    "sequence_logps",
    "unpatch",
]

# Where each public name lives; tests/test_imports.py holds this, the imports above and __all__ equal.
_HOMES = {
    "fastalign.integrations": ["patch", "patch_trl", "unpatch"],
    "fastalign.linear": [
        *("linear_cross_entropy", "linear_dpo_loss", "linear_kto_loss", "linear_ppo_loss", "linear_pro_loss"),
    ],
    "fastalign.ops.linear_logps": ["linear_logps"],
    "fastalign.ops.linear_loss": ["linear_loss"],
    "fastalign.ops.sequences": ["sequence_logps"],
    "fastalign.reference": ["ReferenceCache"],
    "fastalign.trainers": [
        *("DPOConfig", "DPOTrainer", "PPOConfig", "PPOTrainer", "PROConfig", "PROTrainer"),
        *("RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer"),
    ],
    "fastalign.types": ["IGNORE_INDEX", "LinearLogps", "LossOutput", "Metric"],
}
_SUBPACKAGES = ["losses", "ops"]
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # or type checkers would take every name for granted

    def __getattr__(name: str) -> Any:
        value: Any
        if name in _HOME_OF:
            value = getattr(importlib.import_module(_HOME_OF[name]), name)
        elif name in _SUBPACKAGES:
            value = importlib.import_module(f"fastalign.{name}")
        elif name == "__version__":
            from importlib.metadata import version

            value = version("fastalign")
        else:
            raise AttributeError(f"module 'fastalign' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
