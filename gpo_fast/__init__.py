"""gpo-fast: the fast backend for GPO (Guided Pivotal Optimization, arXiv 2509.16456).

The public names are imported on first use, so that `import gpo_fast` (and `gpo-fast --help`) stays quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "StepSplitter": "gpo_fast.steps",
    "Step": "gpo_fast.steps",
    "TokenForest": "gpo_fast.forest",
    "pack_forest": "gpo_fast.packing",
    "PackedBatch": "gpo_fast.packing",
    "PrefixCache": "gpo_fast._C",
    "SamplingParams": "gpo_fast.rollout",
    "Request": "gpo_fast.rollout",
    "Completion": "gpo_fast.rollout",
    "RolloutEngine": "gpo_fast.rollout",
    "CriticalStepFinder": "gpo_fast.critical",
    "CriticalStep": "gpo_fast.critical",
    "linear_logprob": "gpo_fast.losses",
    "linear_policy_loss": "gpo_fast.losses",
    "linear_preference_loss": "gpo_fast.losses",
    "GPOConfig": "gpo_fast.config",
    "GPOTrainer": "gpo_fast.trainer",
    "build_preference_dataset": "gpo_fast.integrations.preference",
}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'gpo_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
