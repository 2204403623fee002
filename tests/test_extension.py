"""The C++ extension's whole surface, called with wrong types and with what does not fit: refused, never a crash.

Each function is called with arguments that it takes, of which one at a time is wrong; afterwards the right call still
works. Functions that take addresses read what is there: of those only the types are checked, and their Python callers
check the rest.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpo_fast import _C, PrefixCache

# -- right calls --------------------------------------------------------------------------------------------------

Call = tuple[Callable[..., Any], dict[str, Any]]


def cache_call(name: str, **arguments: Any) -> Callable[[], Call]:
    """A call on a cache where the handle 0 in `arguments` stands for a sequence of three tokens."""

    def make() -> Call:
        cache = PrefixCache(8, 2)
        sequence, _ = cache.open([1, 2, 3])
        cache.append([sequence], [1, 2, 3], [3])
        handles = {"sequence": sequence, "sequences": [sequence], "pin": cache.pin(sequence)}
        given = {k: handles.get(v, v) if isinstance(v, str) else v for k, v in arguments.items()}
        return getattr(cache, name), given

    return make


KEPT: list[Tensor] = []  # what the addresses below point to


def address(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    KEPT.append(torch.ones(shape, dtype=dtype))
    return KEPT[-1].data_ptr()


def half(*shape: int) -> int:
    return address(*shape, dtype=torch.bfloat16)


def whole(*values: int, dtype: torch.dtype = torch.int64) -> int:
    KEPT.append(torch.tensor(values, dtype=dtype))
    return KEPT[-1].data_ptr()


PLAN = {
    "page_offsets": [0, 1],
    "pages": [0],
    "row_offsets": [0, 1],
    "rows": [0],
    "visible": [2],
    "num_rows": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 4,
    "block_size": 2,
    "scale": 1.0,
    "softcap": 0.0,
    "is_bfloat16": False,
}


def plan(**changes: Any) -> Any:
    return _C.AttentionPlan(**{**PLAN, **changes})


def linear(inputs: int, outputs: int) -> tuple[int, int, int, int]:
    return address(-(-outputs // 64), inputs, 64), 0, inputs, outputs


def layer() -> dict[str, Any]:
    norms = dict.fromkeys(("input_norm", "attention_norm", "query_norm", "key_norm"), address(4))
    square = {name: linear(4, 4) for name in ("output", "gate", "up", "down")}
    return {**norms, "qkv": linear(4, 12), **square, "keys": address(4, 1, 4), "values": address(4, 1, 4)}


DECODER = {"width": 4, "norm_epsilon": 1e-6, "is_bfloat16": False}


def decoder_forward() -> Call:
    decoder = _C.Decoder(**DECODER)
    decoder.add_layer(**layer())
    decoder.set_head(final_norm=address(4), head=linear(4, 8))
    arrays = {name: address(1, 4) for name in ("x", "cos", "sin")}
    rows = {"slots": [0], "selected": [0]}
    return decoder.forward, {"plan": plan(), **arrays, **rows, "logits": address(1, 8), "threads": 1}


def sample() -> Call:
    each = {"temperature": [1.0, 1.0], "top_k": [0, 0], "top_p": [1.0, 1.0], "min_p": [0.0, 0.0], "uniform": [0.5, 0.5]}
    return _C.sample, {"logits": address(2, 16), "vocabulary": 16, **each, "threads": 1}


def logprob_inputs() -> dict[str, Any]:
    pointers = {"hidden": half(2, 32), "weight": half(48, 32), "bias": 0}
    entries = {"targets": whole(1, 2), "target_rows": whole(0, 1)}
    sizes = {"rows": 2, "vocab": 48, "width": 32, "entries": 2}
    return {**pointers, **entries, **sizes, "temperature": 1.0, "softcap": 0.0}


def logprob_forward() -> Call:
    inputs = _C.LogprobInputs(**logprob_inputs())
    floats = {name: address(2) for name in ("target_logits", "target_slopes", "lse", "entropy")}
    rows = {name: half(2, 32) for name in ("expected", "entropy_row")}
    return _C.linear_logprob_forward, {"inputs": inputs, **floats, **rows, "threads": 1}


def logprob_backward() -> Call:
    inputs = _C.LogprobInputs(**logprob_inputs())
    floats = {name: address(2) for name in ("lse", "entropy", "row_grad", "grad_logprobs", "grad_entropy")}
    out = {"hidden": half(2, 32), "weight": half(48, 32), "bias": address(48)}
    return _C.linear_logprob_backward, {"inputs": inputs, **floats, **out, "threads": 1}


def tree_inputs() -> dict[str, Any]:
    views = {name: (half(2, 1, 32), 32, 32) for name in ("query", "key", "value")}
    subtree_end = whole(2, 2, dtype=torch.int32)
    return {**views, "subtree_end": subtree_end, "tokens": 2, "heads": 1, "kv_heads": 1, "dim": 32, "scale": 1.0}


def tree_forward() -> Call:
    inputs = _C.TreeAttentionInputs(**tree_inputs())
    return _C.tree_attention_forward, {"inputs": inputs, "out": half(2, 1, 32), "lse": address(1, 2), "threads": 1}


def tree_backward() -> Call:
    inputs = _C.TreeAttentionInputs(**tree_inputs())
    kept = {"out": half(2, 1, 32), "lse": address(1, 2), "grad_out": (half(2, 1, 32), 32, 32)}
    out = {name: half(2, 1, 32) for name in ("grad_query", "grad_key", "grad_value")}
    return _C.tree_attention_backward, {"inputs": inputs, **kept, **out, "threads": 1}


PACKED = (
    "input_ids",
    "position_ids",
    "rows",
    "row_offsets",
    "pair_targets",
    "pair_of_token",
    "targets",
    "sequence_ids",
    "subtree_end",
    "scratch",
)


FOREST = np.array([(-1, 0, 3), (0, 3, 5)])  # a prompt of three tokens, and a branch of two
TOKENS = [np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)]


def layout(nodes: Any = FOREST) -> Any:
    return _C.PackedLayout(np.array(nodes), [1], [3])


# Functions that read from and write to memory of the caller's.
WITH_ADDRESSES: dict[str, Callable[[], Call]] = {
    "AttentionPlan.attend": lambda: (
        plan().attend,
        {n: address(2, 1, 4) for n in ("query", "keys", "values", "output")} | {"threads": 1},
    ),
    "Decoder.add_layer": lambda: (_C.Decoder(**DECODER).add_layer, layer()),
    "Decoder.forward": decoder_forward,
    "Decoder.set_head": lambda: (_C.Decoder(**DECODER).set_head, {"final_norm": address(4), "head": linear(4, 8)}),
    "LogprobInputs": lambda: (_C.LogprobInputs, logprob_inputs()),
    "PackedLayout.fill": lambda: (
        layout().fill,
        {"tokens": TOKENS, "arrays": {name: address(8, dtype=torch.int64) for name in PACKED}},
    ),
    "TreeAttentionInputs": lambda: (_C.TreeAttentionInputs, tree_inputs()),
    "linear_logprob_backward": logprob_backward,
    "linear_logprob_forward": logprob_forward,
    "pack_panels": lambda: (
        _C.pack_panels,
        {
            "weight": address(64, 1),
            "outputs": 64,
            "inputs": 1,
            "is_bfloat16": False,
            "panels": address(1, 1, 64),
            "threads": 1,
        },
    ),
    "sample": sample,
    "tree_attention_backward": tree_backward,
    "tree_attention_forward": tree_forward,
}
OTHERS: dict[str, Callable[[], Call]] = {
    "AttentionPlan": lambda: (_C.AttentionPlan, PLAN),
    "Decoder": lambda: (_C.Decoder, DECODER),
    "PrefixCache": lambda: (_C.PrefixCache, {"num_blocks": 4, "block_size": 2}),
    "PrefixCache.acknowledge_copies": cache_call("acknowledge_copies"),
    "PrefixCache.append": cache_call("append", seqs="sequences", token_ids=[4], lengths=[1]),
    "PrefixCache.begin_epoch": cache_call("begin_epoch", version=1),
    "PrefixCache.block_table": cache_call("block_table", seq="sequence"),
    "PrefixCache.block_tables": cache_call("block_tables", seqs="sequences"),
    "PrefixCache.bookkeeping_bytes": cache_call("bookkeeping_bytes"),
    "PrefixCache.check_integrity": cache_call("check_integrity"),
    "PrefixCache.commit": cache_call("commit", seqs="sequences"),
    "PrefixCache.evict": cache_call("evict", n=1, priority=0),
    "PrefixCache.fork": cache_call("fork", source="sequences", pos=[2], n=[1]),
    "PrefixCache.length": cache_call("length", seq="sequence"),
    "PrefixCache.mark": cache_call("mark", seq="sequence", pos=2),
    "PrefixCache.open": cache_call("open", tokens=[1], namespace=0),
    "PrefixCache.pin": cache_call("pin", seq="sequence", priority=0, pos=2),
    "PrefixCache.plan": cache_call("plan", seqs="sequences"),
    "PrefixCache.release": cache_call("release", seqs="sequences"),
    "PrefixCache.reserve": cache_call("reserve", seqs="sequences", n=1),
    "PrefixCache.snapshot": cache_call("snapshot", format="text"),
    "PrefixCache.stats": cache_call("stats"),
    "PrefixCache.take_copies": cache_call("take_copies"),
    "PrefixCache.tokens": cache_call("tokens", seq="sequence"),
    "PrefixCache.truncate": cache_call("truncate", seq="sequence", length=1),
    "PrefixCache.unpin": cache_call("unpin", pin="pin"),
    "cpu_kernels": lambda: (_C.cpu_kernels, {}),
    "PackedLayout": lambda: (_C.PackedLayout, {"nodes": FOREST, "branches": [1], "loss_starts": [3]}),
    "linear_logprob_kernels": lambda: (_C.linear_logprob_kernels, {}),
    "tree_attention_supported": lambda: (_C.tree_attention_supported, {"dim": 32}),
    "use_cpu_kernels": lambda: (_C.use_cpu_kernels, {"name": _C.cpu_kernels()}),
    "use_linear_logprob_kernels": lambda: (_C.use_linear_logprob_kernels, {"name": _C.linear_logprob_kernels()}),
}

# -- wrong ones ---------------------------------------------------------------------------------------------------

# No parameter of any function takes one of these.
WRONG = ["x", b"\xff", object(), {"a": 1}, [object()], np.array(["x"]), [[1, 2], [3]], lambda: 0]
# No parameter that is a whole number takes one of these; -1 is refused where it has no meaning, or taken.
NO_WHOLE_NUMBERS = [1.5, None, 2**70, np.zeros((2, 2))]
NUMBERS = [*NO_WHOLE_NUMBERS, -1, -1.5, float("nan"), np.array([2**40]), np.zeros(0), [], [-1], [2**31]]
REFUSED = (TypeError, ValueError, KeyError)  # KeyError: the packer's arrays have names


def refused(function: Callable[..., Any], **arguments: Any) -> bool:
    try:
        function(**arguments)
    except REFUSED:
        return True
    return False


@pytest.mark.parametrize("name", [*WITH_ADDRESSES, *OTHERS])
def test_a_wrong_type_in_any_place_is_refused_and_changes_nothing(name: str) -> None:
    function, right = {**WITH_ADDRESSES, **OTHERS}[name]()
    for argument, value in right.items():
        for wrong in [*WRONG, *(NO_WHOLE_NUMBERS if type(value) is int and argument != "pos" else [])]:
            assert refused(function, **{**right, argument: wrong}), f"{argument}={wrong!r}"
    with pytest.raises(TypeError):
        function(**right, no_such_argument=1)
    runs_here = not name.startswith("tree_") or _C.tree_attention_supported(dim=32)
    if runs_here and (not name.startswith("linear_logprob_") or _C.linear_logprob_kernels() != "none"):
        function(**right)


@pytest.mark.parametrize("name", OTHERS)
def test_numbers_that_do_not_fit_leave_a_cache_whole(name: str) -> None:
    _, right = OTHERS[name]()
    for argument in right:
        for wrong in NUMBERS:
            function, right = OTHERS[name]()
            with contextlib.suppress(*REFUSED, MemoryError):  # MemoryError: no pages are left
                function(**{**right, argument: wrong})
            if isinstance(owner := getattr(function, "__self__", None), PrefixCache):
                owner.check_integrity()


def test_the_whole_surface_is_called() -> None:
    def public(owner: Any) -> list[str]:
        return [n for n, value in inspect.getmembers(owner, callable) if not n.startswith("_")]

    surface = {n for n in public(_C) if not (inspect.isclass(c := getattr(_C, n)) and issubclass(c, Exception))}
    classes = [getattr(_C, n) for n in surface if inspect.isclass(getattr(_C, n))]
    surface |= {f"{c.__name__}.{n}" for c in classes for n in public(c)}
    assert surface == {*WITH_ADDRESSES, *OTHERS, "SharedPlan"}
    with pytest.raises(TypeError, match="No constructor"):
        _C.SharedPlan()


@pytest.mark.parametrize(
    "nodes",
    [
        ((-1, 1, 3), (0, 3, 5)),  # a prompt from depth 1
        ((-1, 0, 3), (1, 3, 5)),  # its own parent
        ((-1, 0, 3), (-2, 3, 5)),
        ((-1, 0, 3), (0, 4, 5)),  # begins behind a gap
        ((-1, 0, 3), (0, 0, 5)),  # before its parent
        ((-1, 0, 3), (0, 3, 2)),  # ends before it begins
    ],
    ids=str,
)
def test_the_packer_refuses_what_is_no_forest(nodes: Any) -> None:
    assert (layout().tokens, layout().losses) == (5, 2)
    with pytest.raises(ValueError, match="must be a prompt from depth 0, or begin within"):
        layout(nodes)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (TOKENS[:1], ValueError, "each node needs tokens"),
        ([[0, 1, 2], TOKENS[1]], TypeError, "must be a numpy array"),
        ([TOKENS[0].astype(np.int64), TOKENS[1]], ValueError, "contiguous int32 array"),
        ([TOKENS[0], TOKENS[1][:1]], ValueError, "of at least its length"),
    ],
    ids=["too few", "a list", "int64", "too short"],
)
def test_the_packer_refuses_tokens_that_do_not_fit(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layout().fill(tokens, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 3, "num_kv_heads": 2},
        {"num_kv_heads": 0},
        {"head_dim": 0},
        {"block_size": 0},
        {"page_offsets": []},
        {"page_offsets": [1, 1]},
        {"page_offsets": [0, 2]},
        {"page_offsets": [0, 2, 1], "row_offsets": [0, 1, 1]},
        {"row_offsets": [0, 2]},
        {"row_offsets": [0, 2, 1], "page_offsets": [0, 1, 1]},
        {"rows": [1]},
        {"rows": [-1]},
        {"visible": [3]},
        {"visible": [-1]},
        {"pages": [-1]},
        {"visible": [1, 2]},
        {"num_rows": -1},
    ],
    ids=str,
)
def test_an_attention_plan_refuses_segments_that_do_not_fit(changes: dict) -> None:
    plan()
    with pytest.raises(ValueError, match=r"segment|num_heads|head_dim"):
        plan(**changes)
