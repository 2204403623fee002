"""The tables of docs/tuning.md: bytes that a model takes in GPO training, from its published shape.

python docs/scripts/memory.py
"""

from __future__ import annotations

from dataclasses import dataclass

GB, GIB = 1e9, 1 << 30
LORA_RANK = 32
MICROBATCH = 4096  # tokens: the default of max_tokens_per_microbatch
DEFAULT_KV_LIMIT = 4 * GIB  # of RolloutEngine
DEFAULT_KV_TOKENS = 64 * 2048  # max_batch_size sequences of 2,048 tokens


@dataclass(frozen=True)
class Shape:
    """A dense decoder with grouped-query attention and a gated MLP."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def parameters(self) -> int:
        """Matrices only: norms and biases are below a thousandth."""
        per_layer = sum(a * b for a, b in self.linears)
        return self.layers * per_layer + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def lora_parameters(self) -> int:
        return self.layers * LORA_RANK * sum(a + b for a, b in self.linears)

    @property
    def kv_bytes(self) -> int:
        """bfloat16 keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    @property
    def layer_activations(self) -> int:
        """bfloat16 bytes that one layer keeps of one token for its backward pass."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * (4 * self.hidden + 2 * queries + 2 * keys + 4 * self.intermediate)

    def activations(self, checkpointing: bool) -> int:
        """Bytes for a microbatch, without the head."""
        if checkpointing:  # each layer's input, and one layer at a time
            return MICROBATCH * (self.layers * self.hidden * 2 + self.layer_activations)
        return MICROBATCH * self.layers * self.layer_activations


SHAPES = (
    Shape("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151_936, True),
    Shape("R1-Distill-Qwen-7B", 28, 3584, 28, 4, 128, 18_944, 152_064, False),
    Shape("R1-Distill-Llama-70B", 80, 8192, 64, 8, 128, 28_672, 128_256, False),
)


def weights() -> str:
    lines = [
        "| model | parameters | bf16 weights | LoRA r=32: adapter, gradients, Adam (16 B each) | "
        "all weights in bf16: + gradients, Adam (8 B) | all weights in fp32 (16 B) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for s in SHAPES:
        n = s.parameters
        lines.append(
            f"| {s.name} | {n / 1e9:.2f} B | {2 * n / GB:.1f} GB | {16 * s.lora_parameters / GB:.2f} GB | "
            f"{8 * n / GB:.1f} GB | {16 * n / GB:.0f} GB |"
        )
    return "\n".join(lines)


def cache() -> str:
    lines = [
        "| model | KV per token | KV for 64 x 2,048 tokens | default of `kv_cache_memory` | tokens that it holds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for s in SHAPES:
        wanted = DEFAULT_KV_TOKENS * s.kv_bytes
        given = min(DEFAULT_KV_LIMIT, wanted)
        lines.append(
            f"| {s.name} | {s.kv_bytes / 1e3:.1f} kB | {wanted / GB:.1f} GB | {given / GB:.1f} GB | "
            f"{given // s.kv_bytes:,} |"
        )
    return "\n".join(lines)


def activations() -> str:
    lines = [
        "| model | activations of 4,096 tokens | with gradient checkpointing | "
        "logits of 4,096 tokens in fp32, which are *not* kept |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {s.name} | {s.activations(False) / GB:.1f} GB | {s.activations(True) / GB:.1f} GB | "
        f"{MICROBATCH * s.vocabulary * 4 / GB:.1f} GB |"
        for s in SHAPES
    ]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    return {"weights": weights(), "cache": cache(), "activations": activations()}


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")
