"""Random forests, and the same branches run packed and one by one, for the tests of packing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gpo_fast import TokenForest
from gpo_fast.packing import PackedBatch, pack_forest


@dataclass
class Grown:
    """A forest, the branches to train, and the depth from which each is trained."""

    forest: TokenForest
    branches: list[int]
    loss_starts: list[int]

    @property
    def paths(self) -> list[list[int]]:
        return [self.forest.path(branch) for branch in self.branches]

    def pack(self) -> PackedBatch:
        return pack_forest(self.forest, self.branches, loss_starts=self.loss_starts)


def grow(seed: int, *, branches: int = 12, depth: int = 6, longest: int = 6, tokens: int = 3) -> Grown:
    """A random forest of one to three trees.

    With few different tokens many siblings begin alike or are identical. Some branches are empty, some are not
    trained, and some are trained from within their ancestors.
    """
    draw = random.Random(seed)
    forest = TokenForest()
    trees = [
        [forest.add_prompt([draw.randrange(3, 60) for _ in range(draw.randint(1, 7))])]
        for _ in range(draw.randint(1, min(3, branches)))
    ]
    level = {tree[0]: 0 for tree in trees}
    for number in range(branches):
        tree = trees[number % len(trees)] if number < len(trees) else draw.choice(trees)
        parent = draw.choice([node for node in tree if level[node] < depth])
        end = forest.nodes[parent].end
        at = draw.choice([end, draw.randint(1, end)])
        length = draw.choice([0, 1, draw.randint(1, longest), draw.randint(1, longest)])
        node = forest.branch(parent, at, [3 + draw.randrange(tokens) for _ in range(length)])
        level[node] = level[parent] + 1
        tree.append(node)
    kept = [leaf for leaf in forest.leaves() if draw.random() < 0.8] or forest.leaves()
    starts = [draw.choice([forest.nodes[b].start, draw.randint(1, forest.nodes[b].end)]) for b in kept]
    if all(start >= forest.nodes[b].end for b, start in zip(kept, starts)):
        kept.append(forest.branch(trees[0][0], 1, [3, 4]))
        starts.append(1)
    return Grown(forest, kept, starts)


forests = st.builds(grow, st.integers(0, 2**32), branches=st.integers(1, 64), longest=st.integers(1, 9))
small_forests = st.builds(grow, st.integers(0, 2**32), branches=st.integers(1, 20))


def widen_norms(model: Any) -> Any:
    """Lets RMSNorm compute in the model's dtype: transformers rounds it to float32 whatever the model is."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

            def forward(x: Tensor, norm: Any = module, shift: float = shift, epsilon: float = epsilon) -> Tensor:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (norm.weight + shift)

            module.forward = forward
    return model


def packed_hidden(model: Any, packed: PackedBatch) -> Tensor:
    """Hidden states of the rows that have a loss, [R, H]; call it and the backward pass within tree attention."""
    output = model.get_decoder()(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, tree=packed.tree
    )
    return output.last_hidden_state[0, packed.rows]


def padded_hidden(model: Any, grown: Grown, packed: PackedBatch) -> Tensor:
    """The same of each branch by itself in one padded batch, one row for each loss token [T, H]."""
    paths = [grown.paths[b] for b in packed.branches]
    width = max(map(len, paths))
    ids = torch.tensor([path + [0] * (width - len(path)) for path in paths])
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    starts = [grown.loss_starts[b] for b in packed.branches]
    return torch.cat([hidden[i, start - 1 : len(path) - 1] for i, (path, start) in enumerate(zip(paths, starts))])


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of all parameters together, relative to `b`, in float64."""
    assert a.keys() == b.keys()
    off = sum((a[n].double() - b[n].double()).square().sum() for n in b)
    return float((off / sum(b[n].double().square().sum() for n in b)).sqrt())
