"""GPO with an offline algorithm, in TRL. Usage: python trl_preferences.py dpo|kto|simpo|orpo [model] [steps]."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from gpo_fast import build_preference_dataset

name, path, steps = [*sys.argv[1:], *["dpo", "HuggingFaceTB/SmolLM2-135M-Instruct", "100"][len(sys.argv) - 1 :]]
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
prompts = [f"{a}+{b}=" for a in range(4) for b in range(4)]


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


dataset = build_preference_dataset(model, prompts, digits, tokenizer, name, max_completion_length=64)
trainers = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}
trainers |= {"simpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}
trainer_class, config = trainers[name]
options = {"loss_type": "simpo", "cpo_alpha": 0.0} if name == "simpo" else {}
options |= {"use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available()}
args = config(output_dir="out", max_steps=int(steps), **options)
trainer = trainer_class(model, args=args, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
