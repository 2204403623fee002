"""Which branches are packed together, so that no batch holds more unique tokens than a budget."""

from __future__ import annotations

from collections.abc import Sequence

from gpo_fast.forest import TokenForest


def plan_microbatches(
    forest: TokenForest, branches: Sequence[int], max_tokens: int, together: Sequence[int] | None = None
) -> list[list[int]]:
    """Lists of places in `branches`, each to be packed by itself.

    Trees go to batches first-fit decreasing by their unique tokens. A tree above the budget is cut between branches
    that are neighbours in depth-first order; each part carries the ancestors of its branches, so nothing but the
    sharing across the cut is lost. A single branch above the budget is a batch of its own.

    Args:
        together: a number for each branch; branches of one tree with the same number are in one batch, whatever
            the budget, such as the two of a preference pair. Default: each branch stands alone.

    Raises:
        ValueError: max_tokens below 1, or a `together` of another length.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if together is not None and len(together) != len(branches):
        raise ValueError(f"{len(branches)} branches need as many numbers in together, got {len(together)}")
    batches: list[list[int]] = []
    sizes: list[int] = []
    trees = [_units(tree, together) for tree in _trees(forest, branches)]
    parts = [part for tree in trees for part in _cut(forest, branches, tree, max_tokens)]
    for size, places in sorted(parts, key=lambda part: -part[0]):
        fits = next((i for i, used in enumerate(sizes) if used + size <= max_tokens), None)
        if fits is None:
            batches.append(places)
            sizes.append(size)
        else:
            batches[fits] += places
            sizes[fits] += size
    return batches


def _trees(forest: TokenForest, branches: Sequence[int]) -> list[list[int]]:
    """The places of each tree's branches, in depth-first order."""
    trees: dict[int, list[tuple[list[tuple[int, int]], int]]] = {}
    for place, branch in enumerate(branches):
        lineage: list[tuple[int, int]] = []
        while branch != -1:
            lineage.append((-forest.nodes[branch].start, branch))
            root, branch = branch, forest.nodes[branch].parent
        trees.setdefault(root, []).append((lineage[::-1], place))
    return [[place for _, place in sorted(tree)] for tree in trees.values()]


def _units(tree: Sequence[int], together: Sequence[int] | None) -> list[list[int]]:
    """The places of a tree, those that stay together as one, in the order of the first of each."""
    units: dict[int, list[int]] = {}
    for place in tree:
        units.setdefault(place if together is None else together[place], []).append(place)
    return list(units.values())


def _cut(
    forest: TokenForest, branches: Sequence[int], tree: Sequence[list[int]], max_tokens: int
) -> list[tuple[int, list[int]]]:
    """(unique tokens, places) of the parts of a tree: each takes its units as long as they fit."""
    parts: list[tuple[int, list[int]]] = []
    ends: dict[int, int] = {}
    for unit in tree:
        added = sum(_extend(forest, ends, branches[place]) for place in unit)
        if parts and parts[-1][0] + added <= max_tokens:
            parts[-1] = (parts[-1][0] + added, [*parts[-1][1], *unit])
            continue
        if parts:
            ends = {}
            added = sum(_extend(forest, ends, branches[place]) for place in unit)
        parts.append((added, [*unit]))
    return parts


def _extend(forest: TokenForest, ends: dict[int, int], branch: int) -> int:
    """Makes `ends` (as `needed_ends` of csrc/packing.cpp) hold the branch too; the number of tokens that this adds."""
    nodes, added = forest.nodes, 0
    node, end = branch, nodes[branch].end
    while node != -1 and ends.get(node, -1) < end:
        added += end - ends.get(node, nodes[node].start)
        ends[node] = end
        node, end = nodes[node].parent, nodes[node].start
    return added
