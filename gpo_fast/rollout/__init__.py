"""Sampling: requests in, completions out."""

from typing import Any

from gpo_fast.rollout.engine import RolloutEngine
from gpo_fast.rollout.stream import RolloutStream
from gpo_fast.rollout.types import Completion, Request, RolloutBackend, SamplingParams

__all__ = [
    "Completion",
    "OpenAIBackend",
    "RayBackend",
    "Request",
    "RolloutBackend",
    "RolloutEngine",
    "RolloutStream",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    """The backends are imported on first use: most runs need neither."""
    if name == "OpenAIBackend":
        from gpo_fast.rollout.openai_backend import OpenAIBackend

        return OpenAIBackend
    if name == "RayBackend":
        from gpo_fast.rollout.ray_backend import RayBackend

        return RayBackend
    raise AttributeError(f"module 'gpo_fast.rollout' has no attribute {name!r}")
