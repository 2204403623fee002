"""Proposals: cheap scores of a trajectory's steps that say where a search should look first. They never decide one.

Each is a function `(completions, steps) -> scores`, a non-negative number for each step of each trajectory. One that
has a method `learn(completions, steps, rewards)` is told first how the rollouts at hand ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gpo_fast.rollout.types import Completion
from gpo_fast.steps import Step

PROPOSALS = ("logprob", "mistake", "entropy", "gradient")
Proposal = Callable[[Sequence[Completion], Sequence[Sequence[Step]]], Sequence[Sequence[float]]]


def surprises(logprobs: Sequence[float], steps: Sequence[Step]) -> np.ndarray:
    """Surprise (nats) of each step's least likely token: free, from the logprobs that the engine recorded."""
    return np.array([-min(logprobs[step.start : step.end], default=0.0) for step in steps])


def logprob_dip(completions: Sequence[Completion], steps: Sequence[Sequence[Step]]) -> list[list[float]]:
    """The steps' `surprises`."""
    return [surprises(c.logprobs, row_steps).tolist() for c, row_steps in zip(completions, steps)]


class FirstMistake:
    """The probability that a step is the first wrong one of a failing chain: free, from the recorded logprobs.

    A model of one parameter. A step of surprise d (`logprob_dip`) is right with the probability exp(-kappa d), and a
    wrong one dooms the chain, so a chain succeeds with the probability exp(-kappa sum d), and step i is its first
    mistake with exp(-kappa sum_{j<i} d_j) (1 - exp(-kappa d_i)). Where one token is right and the policy's
    probabilities are calibrated, kappa is 1; where it may choose its words, kappa is small. `learn` fits it.
    """

    kappa = 1.0

    def learn(
        self, completions: Sequence[Completion], steps: Sequence[Sequence[Step]], rewards: Sequence[float]
    ) -> None:
        """Sets kappa to the likeliest value, given rewards (scaled to 0 to 1 if they go beyond).

        The prior is log-normal around 1, a factor of e^1.5 wide: a few rollouts, or outcomes that are all the same, do
        not move kappa far.
        """
        surprise = np.array([sum(row) for row in logprob_dip(completions, steps)])
        low, high = min([0.0, *rewards]), max([1.0, *rewards])
        outcome = (np.asarray(rewards, dtype=float) - low) / (high - low)
        kappas = np.exp(np.linspace(-8, 3, 221))
        success = np.clip(np.exp(-kappas[:, None] * surprise), 1e-12, 1 - 1e-12)
        likelihood = (outcome * np.log(success) + (1 - outcome) * np.log1p(-success)).sum(axis=1)
        self.kappa = float(kappas[np.argmax(likelihood - (np.log(kappas) / 1.5) ** 2 / 2)])

    def probabilities(self, surprise: np.ndarray) -> np.ndarray:
        """Of each step's being the first mistake, given the steps' `surprises`."""
        hazard = self.kappa * surprise
        before = np.cumsum(hazard) - hazard
        mistake: np.ndarray = np.exp(-before) * -np.expm1(-hazard)
        return mistake

    def __call__(self, completions: Sequence[Completion], steps: Sequence[Sequence[Step]]) -> list[list[float]]:
        return [self.probabilities(surprises(c.logprobs, s)).tolist() for c, s in zip(completions, steps)]


class TokenEntropy:
    """Largest entropy (nats) of the model's next-token distributions within a step; one forward pass each."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, completions: Sequence[Completion], steps: Sequence[Sequence[Step]]) -> list[list[float]]:
        scores = []
        for completion, row_steps in zip(completions, steps):
            tokens = [*completion.prompt_token_ids, *completion.token_ids]
            first = len(completion.prompt_token_ids) - 1
            ids = torch.tensor([tokens], device=self.model.device)
            logprobs = self.model(input_ids=ids, use_cache=False).logits[0, first:-1].float().log_softmax(-1)
            entropy = (-logprobs.exp() * logprobs).nan_to_num().sum(-1).tolist()
            scores.append([max(entropy[s.start : s.end], default=0.0) for s in row_steps])
        return scores


class GradientScore:
    """How strongly the outcome hangs on a step: one backward pass for each trajectory.

    The logprob of the last step (where the answer stands) is differentiated with respect to the input embeddings;
    a step's score is the norm of the gradient over its tokens. The last step itself scores 0: it is the outcome.
    This is a saliency score for ordering a search. GPO's critical steps come from advantages.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, completions: Sequence[Completion], steps: Sequence[Sequence[Step]]) -> list[list[float]]:
        return [self._one(c, row_steps) for c, row_steps in zip(completions, steps)]

    def _one(self, completion: Completion, steps: Sequence[Step]) -> list[float]:
        prompt = len(completion.prompt_token_ids)
        last = steps[-1]
        if last.start == 0 or last.end == last.start:
            return [0.0] * len(steps)
        tokens = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]], device=self.model.device)
        with torch.enable_grad():
            embeddings = self.model.get_input_embeddings()(tokens).detach().requires_grad_()
            logits = self.model(inputs_embeds=embeddings, use_cache=False).logits[0]
            at = torch.arange(prompt + last.start, prompt + last.end, device=tokens.device)
            outcome = logits[at - 1].float().log_softmax(-1).gather(-1, tokens[0, at, None]).sum()
            (gradient,) = torch.autograd.grad(outcome, embeddings)
        norms = [float(gradient[0, prompt + s.start : prompt + s.end].float().norm()) for s in steps]
        return [*norms[:-1], 0.0]


def named_proposal(proposal: str | Proposal | None, engine: Any) -> Proposal | None:
    """The proposal of one of the `PROPOSALS`; "entropy" and "gradient" need an engine with a `model`.

    Raises:
        ValueError: another name, or an engine without a model.
    """
    if proposal is None or callable(proposal):
        return proposal
    if proposal == "logprob":
        return logprob_dip
    if proposal == "mistake":
        return FirstMistake()
    if proposal not in PROPOSALS:
        raise ValueError(f"proposal must be one of {', '.join(PROPOSALS)}, or a function, got {proposal!r}")
    if not hasattr(engine, "model"):
        raise ValueError(f"the proposal {proposal!r} needs a local model, and {type(engine).__name__} has none")
    return TokenEntropy(engine.model) if proposal == "entropy" else GradientScore(engine.model)
