"""The fast forward pass on a CPU: known architectures with prepacked weights, whole in C++ (csrc/cpu/decoder.h).

The weights are copied into panels once per epoch; LoRA and DoRA adapters are merged into the copy, in float32 before
it is rounded. (The trainer adds an adapter's product to the base product instead: in bfloat16 the two differ by
rounding, as two orders of summation do; in float32 they agree to its precision.) The model itself is never changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpo_fast import _C
from gpo_fast.rollout.attention import KVPool, attention_plan
from gpo_fast.rollout.memory import Arena, Reused
from gpo_fast.rollout.segments import Segments

ARCHITECTURES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"}
STATIC_ROTARY = {"default", "linear", "llama3", "yarn"}  # positions alone decide the angles
PANEL = 64


class Packed:
    """A weight [outputs, inputs] in panels of 64 outputs: [panels, 2, inputs / 2, 32, 2] bfloat16, or
    [panels, inputs, 64] float32."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype, arena: Arena) -> None:
        self.modules = modules
        weights, biases = zip(*(merged_weight(m) for m in modules))
        self.outputs, self.inputs = sum(len(w) for w in weights), weights[0].shape[1]
        if self.inputs % 2:
            raise ValueError(f"a layer with {self.inputs} inputs, an odd number")
        self.panels = arena.empty((-(-self.outputs // PANEL), PANEL * self.inputs), dtype)
        self.bias = torch.zeros(self.outputs) if any(b is not None for b in biases) else None
        self.pack()

    def pack(self) -> None:
        """Copies the modules' weights as they are now."""
        weights, biases = zip(*(merged_weight(m) for m in self.modules))
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        weight = weight.to(self.panels.dtype).contiguous()
        _C.pack_panels(
            weight=weight.data_ptr(),
            outputs=self.outputs,
            inputs=self.inputs,
            is_bfloat16=weight.dtype == torch.bfloat16,
            panels=self.panels.data_ptr(),
            threads=torch.get_num_threads(),
        )
        if self.bias is not None:
            parts = [torch.zeros(len(w)) if b is None else b for w, b in zip(weights, biases)]
            self.bias.copy_(torch.cat(parts))

    def arguments(self) -> tuple[int, int, int, int]:
        """What the C++ side takes: (panels, bias or 0, inputs, outputs)."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return self.panels.data_ptr(), bias, self.inputs, self.outputs


class PackedDecoder:
    """The forward pass of a recognised model over one packed row of tokens, keys and values in `pool`.

    Raises:
        ValueError: the model is not one that this pass computes; the message says why, and the model's own modules
            run instead.
    """

    def __init__(self, model: Any, pool: KVPool) -> None:
        config = model.config.get_text_config()
        reason = unrecognised(model, config, pool)
        if reason:
            raise ValueError(reason)
        self.pool = pool
        self.dtype = pool.keys.dtype
        self.decoder = model.get_decoder()
        self.heads = config.num_attention_heads
        self.scale = float(self.decoder.layers[0].self_attn.scaling)
        self._vectors: list[tuple[Any, Tensor]] = []  # norms as float32, and the modules that they are copies of
        self._packed: list[Packed] = []
        self._arena = Arena()
        self._logits = Reused()
        self._cos = self._sin = torch.zeros(0, pool.keys.shape[-1])  # of the positions met so far
        self._core = _C.Decoder(
            width=config.hidden_size, norm_epsilon=config.rms_norm_eps, is_bfloat16=self.dtype == torch.bfloat16
        )
        for number, layer in enumerate(self.decoder.layers):
            self._add_layer(layer, pool.keys[number], pool.values[number])
        self.head = self._pack([model.get_output_embeddings()])
        self._core.set_head(self._vector(self.decoder.norm), self.head.arguments())

    def _add_layer(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        attention, feed_forward = layer.self_attn, layer.mlp
        self._core.add_layer(
            input_norm=self._vector(layer.input_layernorm),
            attention_norm=self._vector(layer.post_attention_layernorm),
            query_norm=self._vector(getattr(attention, "q_norm", None)),
            key_norm=self._vector(getattr(attention, "k_norm", None)),
            qkv=self._pack([attention.q_proj, attention.k_proj, attention.v_proj]).arguments(),
            output=self._pack([attention.o_proj]).arguments(),
            gate=self._pack([feed_forward.gate_proj]).arguments(),
            up=self._pack([feed_forward.up_proj]).arguments(),
            down=self._pack([feed_forward.down_proj]).arguments(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )

    def _vector(self, norm: Any) -> int:
        if norm is None:
            return 0
        vector: Tensor = norm.weight.detach().float().clone()
        self._vectors.append((norm, vector))
        return vector.data_ptr()

    def _pack(self, modules: list[Any]) -> Packed:
        self._packed.append(Packed(modules, self.dtype, self._arena))
        return self._packed[-1]

    @torch.no_grad()
    def repack(self) -> None:
        """Takes over the model's weights as they are now."""
        for norm, vector in self._vectors:
            vector.copy_(norm.weight)
        for packed in self._packed:
            packed.pack()

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, segments: Segments, selected: np.ndarray
    ) -> Tensor:
        """Logits, float32 [selected rows, vocabulary], of N tokens (int64) at `positions`, written to `slots`."""
        x = self.decoder.embed_tokens(torch.from_numpy(tokens)).float().contiguous()  # [N, width]
        self._grow_angles(int(positions.max()) + 1)
        at = torch.from_numpy(positions)
        cos, sin = self._cos[at], self._sin[at]  # [N, head size]
        logits = self._logits.empty(len(selected) * self.head.outputs, torch.float32).view(-1, self.head.outputs)
        self._core.forward(
            plan=attention_plan(segments, len(tokens), self.pool, self.heads, self.scale),
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            slots=slots,
            selected=selected,
            logits=logits.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return logits

    def _grow_angles(self, length: int) -> None:
        """Rotary cosines and sines of at least `length` positions, rounded as the model rounds them."""
        if length <= len(self._cos):
            return
        positions = torch.arange(1 << (length - 1).bit_length())[None]
        rotary: Any = self.decoder.rotary_emb
        cos, sin = rotary(torch.zeros(1, dtype=self.dtype), positions)
        self._cos, self._sin = cos[0].float().contiguous(), sin[0].float().contiguous()


def merged_weight(module: Any) -> tuple[Tensor, Tensor | None]:
    """A linear module's weight [outputs, inputs] and bias, active LoRA or DoRA adapters merged in float32.

    Raises:
        ValueError: neither a plain linear module nor one with such adapters.
    """
    if type(module) is nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(module, LoraLinear) or type(module.base_layer) is not nn.Linear:
        raise ValueError(f"a layer of the type {type(module).__name__}")
    layer: Any = module
    weight, bias = merged_weight(layer.base_layer)
    if layer.merged or layer.disable_adapters:
        return weight, bias
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    variants = [type(layer.lora_variant[a]).__name__ for a in active if a in layer.lora_variant]
    if any(layer.lora_bias.get(a) for a in active) or variants not in ([], ["DoraLinearVariant"]):
        raise ValueError("a variant of LoRA other than DoRA")
    if variants and len(active) > 1:
        raise ValueError("DoRA beside another adapter")
    total = weight.float()
    for adapter in active:
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        delta = b.float() @ a.float() * layer.scaling[adapter]
        total = total + (delta.T if layer.fan_in_fan_out else delta)
    if variants:  # each output's weights have a trained length (arXiv 2402.09353, equation 5)
        magnitude = layer.lora_magnitude_vector[active[0]].weight.detach().float()
        total = total * (magnitude / torch.linalg.norm(total, dim=1))[:, None]
    return total.to(weight.dtype), bias


def unrecognised(model: Any, config: Any, pool: KVPool) -> str | None:
    """Why the fast pass cannot run this model, or None."""
    name = type(model).__name__
    if name not in ARCHITECTURES or not type(model).__module__.startswith("transformers."):
        return f"the architecture {name}"
    if pool.keys.device.type != "cpu":
        return f"the device {pool.keys.device.type!r}"
    if {p.dtype for p in model.parameters()} - {pool.keys.dtype, torch.float32}:
        return "weights of several types"
    if getattr(config, "hidden_act", None) != "silu":
        return f"the activation {getattr(config, 'hidden_act', None)!r}"
    rotary = model.get_decoder().rotary_emb
    if getattr(rotary, "rope_type", "default") not in STATIC_ROTARY:
        return f"rotary positions of the type {rotary.rope_type!r}"
    if rotary.inv_freq.shape[-1] * 2 != pool.keys.shape[-1]:
        return "rotary positions on a part of each head"
    return None
