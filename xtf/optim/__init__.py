"""Optimizers as values: pairs of pure functions (init, update), and schedules of the learning rate.

    tx = chain(clip_by_global_norm(1.0), adamw(schedules.cosine(3e-4, steps=1000, warmup=0.05)))
    opt = tx.init(params)
    updates, opt = tx.update(grads, opt, params, ops)
    params = apply_updates(params, updates)
"""
from xtf.optim import schedules
from xtf.optim.adamw import adamw
from xtf.optim.core import Optimizer, apply_updates, chain, clip_by_global_norm

__all__ = ["Optimizer", "adamw", "apply_updates", "chain", "clip_by_global_norm", "schedules"]
