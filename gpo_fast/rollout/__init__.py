"""Sampling: requests in, completions out."""

from gpo_fast.rollout.types import Completion, Request, RolloutBackend, SamplingParams

__all__ = ["Completion", "Request", "RolloutBackend", "SamplingParams"]
