"""The token forest: what was sampled, as trees. A prompt is a root, trajectories hang from it, branches from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Node:
    """A run of tokens. Its path is its parent's path up to `start` tokens, then its own tokens.

    The tokens are fixed once the node is made: `tokens` is the same run as an array, int32, for the packer.
    """

    parent: int  # -1: a prompt
    start: int  # depth of the first own token
    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    reward: float | None = None
    data: dict[str, Any] = field(default_factory=dict)
    tokens: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.token_ids, dtype=np.int32)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class TokenForest:
    """Trees of token runs in which a shared token is held once.

    Every node but a prompt stands for one trajectory: the path from its prompt to its own last token.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add_prompt(self, token_ids: Sequence[int], **data: Any) -> int:
        """A new root. Raises ValueError if it is empty."""
        if len(token_ids) == 0:
            raise ValueError("a prompt needs at least one token")
        self.nodes.append(Node(-1, 0, list(token_ids), data=data))
        return len(self.nodes) - 1

    def branch(
        self,
        node: int,
        at: int,
        token_ids: Sequence[int],
        *,
        logprobs: Sequence[float] = (),
        reward: float | None = None,
        **data: Any,
    ) -> int:
        """A new trajectory: the first `at` tokens of `node`'s path, then `token_ids`.

        `at` counts from the start of the prompt. The new node hangs from the ancestor that holds token `at - 1`.

        Raises:
            ValueError: no such node, `at` is not within 1 and the length of its path, or the logprobs do not match the
                tokens.
        """
        if not 0 <= node < len(self.nodes):
            raise ValueError(f"the forest has the nodes 0 to {len(self.nodes) - 1}, got the node {node}")
        if not 1 <= at <= self.nodes[node].end:
            raise ValueError(f"the path of node {node} has {self.nodes[node].end} tokens, cannot branch at {at}")
        if len(logprobs) not in (0, len(token_ids)):
            raise ValueError(f"{len(token_ids)} tokens need as many logprobs, got {len(logprobs)}")
        while self.nodes[node].start >= at:
            node = self.nodes[node].parent
        self.nodes.append(Node(node, at, list(token_ids), list(logprobs), reward, data))
        return len(self.nodes) - 1

    def path(self, node: int) -> list[int]:
        """All tokens from the prompt's first to the node's last."""
        tokens: list[int] = []
        end = self.nodes[node].end
        while node != -1:
            own = self.nodes[node]
            tokens[:0] = own.token_ids[: end - own.start]
            node, end = own.parent, own.start
        return tokens

    def structure(self) -> list[tuple[int, int, list[int]]]:
        """Parent, start and tokens of every node: all that `from_structure` needs, and JSON can hold it."""
        return [(node.parent, node.start, node.token_ids) for node in self.nodes]

    @classmethod
    def from_structure(cls, structure: Sequence[Sequence[Any]]) -> TokenForest:
        """The forest of a `structure`, as it was or read back from JSON."""
        forest = cls()
        forest.nodes = [Node(parent, start, list(token_ids)) for parent, start, token_ids in structure]
        return forest

    def leaves(self) -> list[int]:
        """The nodes that stand for trajectories, in the order in which they were added."""
        return [index for index, node in enumerate(self.nodes) if node.parent != -1]

    @property
    def unique_tokens(self) -> int:
        """Tokens with shared ones counted once: what a packed training batch holds."""
        return sum(len(node.token_ids) for node in self.nodes)

    @property
    def total_tokens(self) -> int:
        """Tokens of all trajectories, each with its whole path: what a padded training batch holds."""
        return sum(self.nodes[leaf].end for leaf in self.leaves())
