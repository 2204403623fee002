"""Tree-packed training: a forest as one batch in which a shared token runs forward and backward once.

Loss and gradients are those of the separate sequences, with one exception: what a model adds to its loss by itself,
such as the load-balancing loss of a mixture of experts, is a mean over the tokens that run. Packed, a shared token
counts there once, not once for each branch. (GPOTrainer adds no such loss, packed or padded.)

Dropout above 0 is refused: branches would share the random mask of their shared tokens.
"""

from gpo_fast.packing.batch import PackedBatch, pack_forest
from gpo_fast.packing.microbatches import plan_microbatches

__all__ = ["PackedBatch", "pack_forest", "plan_microbatches"]
