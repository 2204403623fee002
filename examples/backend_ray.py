"""Preference data sampled by a pool of Ray actors. Usage: python backend_ray.py [model] [actors]."""

import sys

from gpo_fast import build_preference_dataset
from gpo_fast.rollout import RayBackend

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
backend = RayBackend(model, num_actors=int(sys.argv[2]) if len(sys.argv) > 2 else 2)
prompts = [f"{a}+{b}=" for a in range(4) for b in range(4)]


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


dataset = build_preference_dataset(backend, prompts, digits, max_completion_length=64)
dataset.to_json("preferences.jsonl")
print(dataset.info.description, backend.stats())
