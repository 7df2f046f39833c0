"""Check your own model and step: strategies for layouts and batches, real ranks, and one assertion."""
from xtf.testing._pool import Pool, pool
from xtf.testing.laws import Equivalence, Layout, assert_equivalent, layouts, token_batches
from xtf.testing.parity import logits_and_grads

__all__ = ["Equivalence", "Layout", "Pool", "assert_equivalent", "layouts", "logits_and_grads", "pool", "token_batches"]
