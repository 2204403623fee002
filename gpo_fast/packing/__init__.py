"""Tree-packed training: a forest as one batch in which a shared token runs forward and backward once."""

from gpo_fast.packing.batch import PackedBatch, pack_forest
from gpo_fast.packing.microbatches import plan_microbatches

__all__ = ["PackedBatch", "pack_forest", "plan_microbatches"]
