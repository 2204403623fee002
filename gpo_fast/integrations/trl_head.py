"""Our fused log-probabilities behind TRL's `model(..., labels=labels, fused_lm_head=True)`.

TRL 1.16 patches a model's forward with its own chunked head (`trl.trainer.utils.add_fused_lm_head`). This patches it
once more: same call, same result type, but the log-probabilities come from `gpo_fast.linear_logprob`'s kernels. TRL's
losses, and whatever wraps the model (DDP, PEFT, accelerate), see no difference.
"""

from __future__ import annotations

import functools
import logging
import types
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from gpo_fast.losses.head import IGNORED
from gpo_fast.losses.linear_logprob import HeadInputs, logprobs_and_entropy
from gpo_fast.losses.shared_rows import token_logprobs
from gpo_fast.packing import PackedBatch

logger = logging.getLogger(__name__)

_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def install_fused_head(model: Any, temperature: float, *, entropy: bool, entropy_needs_grad: bool) -> str | None:
    """Replaces TRL's fused head on `model` (the base model under an adapter) by ours.

    The forward pass then also takes `packed`, a PackedBatch in place of tokens and labels; `log_probs` and `entropy`
    are then those of its T loss tokens.

    Args:
        temperature: the logits are divided by it.
        entropy: whether TRL reads the entropy of this model.
        entropy_needs_grad: whether the entropy is part of the loss.

    Returns:
        None, or the reason why TRL's own head stays; it is logged as well.
    """
    reason = _why_not(model)
    if reason is not None:
        logger.warning("TRL's own log-probabilities are used, because %s", reason)
        return reason
    trl_forward = model.forward
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)  # generate() validates its arguments against this signature
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, packed: PackedBatch | None = None, **kwargs: Any
    ) -> Any:
        needs_grad = entropy and entropy_needs_grad and torch.is_grad_enabled()
        if packed is not None:
            return _packed_forward(self, packed, temperature, softcap, entropy, needs_grad)
        if not fused_lm_head or kwargs.get("output_router_logits") or kwargs.get("shift_labels") is not None:
            return trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        labels, count = kwargs.pop("labels")[:, 1:], kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        head = self.get_output_embeddings()
        logprobs, entropies = logprobs_and_entropy(
            hidden,
            labels,
            HeadInputs(head.weight, head.bias, temperature, softcap),
            want_entropy=entropy,
            entropy_needs_grad=needs_grad,
        )
        mask = labels != IGNORED
        loss = -logprobs.sum() / (mask.sum().clamp(min=1) if count is None else count)
        return FusedCausalLMOutput(
            loss=loss, log_probs=logprobs, entropy=entropies if entropy else None, label_mask=mask
        )

    model.forward = types.MethodType(forward, model)
    return None


def _packed_forward(
    model: Any, packed: PackedBatch, temperature: float, softcap: float | None, entropy: bool, needs_grad: bool
) -> FusedCausalLMOutput:
    hidden = model.base_model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, tree=packed.tree
    ).last_hidden_state
    head = model.get_output_embeddings()
    logprobs, entropies = token_logprobs(
        hidden.flatten(0, 1)[packed.rows],
        packed.targets,
        HeadInputs(head.weight, head.bias, temperature, softcap),
        packed.shared,
        want_entropy=entropy,
        entropy_needs_grad=needs_grad,
    )
    return FusedCausalLMOutput(loss=-logprobs.mean(), log_probs=logprobs, entropy=entropies if entropy else None)


def _why_not(model: Any) -> str | None:
    """Why our head cannot stand in for this model's, or None."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"the output head is a {type(head).__name__}, not a plain linear layer"
    if "forward" in vars(head):
        return "the output head's forward has been replaced (cast_lm_head_to_fp32)"
    if isinstance(head.weight, torch.distributed.tensor.DTensor):
        return "the output head is sharded"
    for name in _SCALES:
        if getattr(config, name, None) not in (None, 1.0):
            return f"the model scales its logits ({name}={getattr(config, name)})"
    if getattr(config, "output_router_logits", False):
        return "the model adds a router loss"
    return None
