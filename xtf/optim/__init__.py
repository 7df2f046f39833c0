"""Optimizers as values: pairs of pure functions (init, update), and schedules of the learning rate.

    tx = chain(clip_by_global_norm(1.0), adamw(schedules.cosine(3e-4, steps=1000, warmup=0.05)))
    opt = tx.init(params)
    updates, opt = tx.update(grads, opt, params, ops)
    params = apply_updates(params, updates)
"""
from xtf.optim import schedules
from xtf.optim._adamw import adamw
from xtf.optim._ema import Ema, averaged, ema
from xtf.optim._guard import Guard, guard
from xtf.optim._muon import hidden_matrices, muon, orthogonalise
from xtf.optim._partition import partition
from xtf.optim.core import Optimizer, apply_updates, chain, clip_by_global_norm
from xtf.optim.leafwise import lion, sgd

__all__ = ["Ema", "Guard", "Optimizer", "adamw", "apply_updates", "averaged", "chain", "clip_by_global_norm", "ema",
           "guard", "hidden_matrices", "lion", "muon", "orthogonalise", "partition", "schedules", "sgd"]
