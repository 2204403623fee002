"""Preference data sampled by a vLLM server. Usage: python backend_openai.py http://localhost:8000/v1 MODEL.

Start the server with: vllm serve MODEL
"""

import sys

from transformers import AutoTokenizer

from gpo_fast import build_preference_dataset
from gpo_fast.rollout import OpenAIBackend

url, model = sys.argv[1], sys.argv[2]
backend = OpenAIBackend(url, model, AutoTokenizer.from_pretrained(model))
prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


def contains_answer(completions, answer, **_):
    return [float(a in c) for c, a in zip(completions, answer)]


dataset = build_preference_dataset(backend, prompts, contains_answer, format="dpo")
dataset.to_json("preferences.jsonl")
print(dataset.info.description)
