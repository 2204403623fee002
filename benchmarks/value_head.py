"""What a linear value of hidden states explains of the rewards, iteration by iteration: least squares or Adam.

    python benchmarks/value_head.py

The policy is SmolLM2 and does not move, so that all ways see the same states. Each iteration samples completions of
some prompts; a way values their states and then learns from them, so nothing is explained that was seen before. The
first reward is decided by the prompt (can the states say it at all?), the second by chance (what harm is done?).
Adam is what PPO's implementations do: one step an iteration on the clipped value loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from gpo_fast.bench.common import Table, finish, parser
from torch import Tensor, nn

from gpo_fast import Request, RolloutEngine, SamplingParams
from gpo_fast.critic import ValueHead
from gpo_fast.demo.model import load_demo_model

Iteration = tuple[Tensor, Tensor, Tensor]  # hidden [T, H], the prompt's reward [T], a random reward [T]
Learner = Callable[[Tensor, Tensor], Tensor]  # (hidden, returns) -> values before they were learned

CLIP = 0.2  # of Adam's values, as is usual with PPO
SHOWN = {"2 to 4": slice(1, 4), "5 to 8": slice(4, 8), "9 to 12": slice(8, 12)}


def sample(iterations: int, prompts: int, n: int, tokens: int) -> list[Iteration]:
    """States of new completions: the hidden state before each of their tokens."""
    model, tokenizer = load_demo_model()
    engine = RolloutEngine(model, tokenizer)
    questions = [tokenizer(f"Question: what is {a}+{b}? Answer:")["input_ids"] for a in range(8) for b in range(4)]
    sampling = SamplingParams(max_tokens=tokens)
    rng = np.random.default_rng(0)
    found = []
    for iteration in range(iterations):
        chosen = rng.choice(len(questions), prompts, replace=False)
        states, rewards = [], []
        for completion in engine.generate([Request(questions[i], n, sampling, 1000 * iteration + i) for i in chosen]):
            ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                hidden = model.get_decoder()(ids).last_hidden_state[0]
            states.append(hidden[len(completion.prompt_token_ids) - 1 : -1])
            four_or_more = chosen[completion.request_index] >= 16  # the first number
            rewards += [[float(four_or_more), float(rng.integers(2))]] * len(completion.token_ids)
        found.append((torch.cat(states), *torch.tensor(rewards).unbind(1)))
    return found


def least_squares(width: int) -> Learner:
    head = ValueHead(width)

    def learn(hidden: Tensor, returns: Tensor) -> Tensor:
        values = head(hidden)
        head.learn(head.products(hidden, returns))
        return values

    return learn


def adam(learning_rate: float, width: int) -> Learner:
    linear = nn.Linear(width, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=learning_rate)

    def learn(hidden: Tensor, returns: Tensor) -> Tensor:
        old = linear(hidden)[:, 0].detach()
        values = linear(hidden)[:, 0]
        near = old + (values - old).clamp(-CLIP, CLIP)
        loss = 0.5 * torch.maximum((values - returns).square(), (near - returns).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
        optimizer.step()
        return old

    return learn


WAYS: dict[str, Callable[[int], Learner]] = {
    'least squares (`critic="value_head"`)': least_squares,
    "Adam, learning rate 1e-3": partial(adam, 1e-3),
    "Adam, learning rate 1e-2": partial(adam, 1e-2),
}


def explained(learn: Learner, iterations: list[Iteration], reward: int) -> list[float]:
    """Share of the rewards' variance that the values explain, in each iteration."""
    shares = []
    for iteration in iterations:
        hidden, returns = iteration[0], iteration[reward]
        errors = returns - learn(hidden, returns)
        shares.append(1 - float(errors.var() / returns.var()))
    return shares


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    iterations = sample(3, 16, 1, 4) if arguments.quick else sample(12, 8, 4, 8)
    tables, data = [], {}
    for reward, title in ((1, "the prompt decides the reward"), (2, "chance decides the reward")):
        table = Table(f"explained variance: {title}", ("way", *(f"iterations {name}" for name in SHOWN)))
        for name, build in WAYS.items():
            shares = explained(build(iterations[0][0].shape[1]), iterations, reward)
            table.add(name, *(f"{np.mean(shares[part]):.2f}" if shares[part] else "-" for part in SHOWN.values()))
            data[f"{title}: {name}"] = shares
        tables.append(table)
    finish(arguments, tables, data)


if __name__ == "__main__":
    main()
