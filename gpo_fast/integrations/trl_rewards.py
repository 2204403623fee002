"""TRL's reward functions on rollouts that TRL does not see: the samples of a search, on one process alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from trl.data_utils import apply_chat_template, is_conversational

from gpo_fast.data import columns_of
from gpo_fast.rewards import RewardFunctions


class LocalRewards:
    """Calls a GRPOTrainer's reward functions and models as it does itself, without gathering over processes."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        functions = [
            self._model_reward(function, processing) if isinstance(function, torch.nn.Module) else function
            for function, processing in zip(trainer.reward_funcs, trainer.reward_processing_classes)
        ]
        weights = trainer.reward_weights.double().cpu().numpy()
        self._rewards = RewardFunctions(functions, weights, allow_silent=True)

    def score(self, inputs: list[dict[str, Any]], completions: list[Any], ids: list[list[int]]) -> np.ndarray:
        """Weighted sums of the rewards, float64 (n,); 0 where no function applies."""
        columns: dict[str, Any] = columns_of(inputs, without=("prompt", "completion", "completion_ids"))
        columns["trainer_state"] = self.trainer.state
        # Logs are about the batch that is trained on, not about the search.
        columns["log_extra"] = columns["log_metric"] = lambda *_: None
        return self._rewards([row["prompt"] for row in inputs], completions, ids, columns).total

    def _model_reward(self, model: torch.nn.Module, processing: Any) -> Any:
        def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
            if is_conversational({"prompt": prompts[0]}):
                rows = [{"messages": p + c} for p, c in zip(prompts, completions)]
                options = self.trainer.chat_template_kwargs
                texts = [apply_chat_template(row, processing, **options)["text"] for row in rows]
            else:
                texts = [p + c for p, c in zip(prompts, completions)]
            batch = processing(
                text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
            )
            with torch.inference_mode():
                logits: torch.Tensor = model(**batch.to(self.trainer.accelerator.device)).logits
            return logits[:, 0].tolist()

        return reward
