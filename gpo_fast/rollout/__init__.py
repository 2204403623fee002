"""Sampling: requests in, completions out."""

from gpo_fast.rollout.engine import RolloutEngine
from gpo_fast.rollout.stream import RolloutStream
from gpo_fast.rollout.types import Completion, Request, RolloutBackend, SamplingParams

__all__ = ["Completion", "Request", "RolloutBackend", "RolloutEngine", "RolloutStream", "SamplingParams"]
