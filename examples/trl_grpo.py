"""Plain GRPO with TRL. Usage: python trl_grpo.py [model] [steps]. Compare with trl_gpo.py, line by line."""

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


def right(completions, answer, **_):
    return [float(c.strip().startswith(a)) + 0.1 * (a in c) for c, a in zip(completions, answer)]


args = GRPOConfig(
    output_dir="out",
    max_steps=steps,
    num_generations=4,
    max_completion_length=32,
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
)
trainer = GRPOTrainer(model, right, args=args, train_dataset=Dataset.from_list(rows))
trainer.train()
