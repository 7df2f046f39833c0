"""Another optimizer, or another learning rate, for some of the leaves."""
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xtf import tree
from xtf.ops import LOCAL, Ops
from xtf.optim.core import Optimizer


def partition(txs: Mapping[str, Optimizer], label_of: Callable[[str, torch.Tensor], str]) -> Optimizer:
    """Each leaf to the optimizer that its label names.

    An optimizer sees its leaves as a dict by path, so its masks get the paths they would get alone. `norm` is not
    passed on: it is that of all leaves (clip before the partition).

    Args:
        txs: the optimizers by label; a label may have no leaves.
        label_of: `label_of(path, leaf)` is a leaf's label.

    Returns: an `Optimizer` whose state is a dict of theirs by label.

    Raises: ValueError, naming the leaf, for a label that is not among `txs`, when it makes its state or updates.

    >>> fast = lambda path, leaf: "fast" if path == "head" else "slow"
    >>> from xtf.optim import sgd
    >>> tx = partition({"fast": sgd(1.0), "slow": sgd(0.1)}, fast)
    >>> params = {"body": torch.zeros(1), "head": torch.zeros(1)}
    >>> updates, _ = tx.update({"body": torch.ones(1), "head": torch.ones(1)}, tx.init(params), params)
    >>> updates
    {'body': tensor([-0.1000]), 'head': tensor([-1.])}
    """
    def split(params: tree.Tree) -> dict[str, dict[str, int]]:
        """For each label its leaves' paths, and their places in the tree."""
        groups: dict[str, dict[str, int]] = {label: {} for label in txs}
        for i, (path, p) in enumerate(tree.flatten_with_path(params)):
            label = label_of(path, p)
            if label not in groups:
                raise ValueError(f"partition: {path} is labelled {label!r}, but there are optimizers for "
                                 f"{', '.join(map(repr, txs))}")
            groups[label][path] = i
        return groups

    def init(params: tree.Tree) -> tree.Tree:
        leaves = tree.leaves(params)
        return {label: txs[label].init({path: leaves[i] for path, i in group.items()})
                for label, group in split(params).items()}

    def update(grads: tree.Tree, state: Any, params: tree.Tree, ops: Ops = LOCAL,
               **extra: Any) -> tuple[tree.Tree, Any]:
        extra.pop("norm", None)
        pairs = tree.zip_leaves(params, grads)
        updates: list[Any] = [None] * len(pairs)
        new = dict(state)
        for label, group in split(params).items():
            if not group:
                continue  # nothing to do, and its count of steps is nobody's
            some, given = ({path: pairs[i][k] for path, i in group.items()} for k in (0, 1))
            moved, new[label] = txs[label].update(given, state[label], some, ops, **extra)
            for path, i in group.items():
                updates[i] = moved[path]
        return tree.unflatten(updates, params), new
    return Optimizer(init, update)
