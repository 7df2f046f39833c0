"""What a step multiplies: FLOPs of the products of forward, and of the gradients that backward really makes.

A product y = x Wᵀ costs 2 × the numbers of W for each token in forward, and as much for each of two gradients: that of
x, where something before it is trained (or adapted), and that of W, where W is trained. So a step that trains
everything costs three times its forward; one that trains adapters, or its last layers, costs less.

Specs tell which are made. A layer is read in the order of its nodes, which is the order in which they are applied, and
by the names of axes: what a product has as its input axis it reads from the nodes before that have it as their output
axis, "embed" from the stream, as the last norm left it. Norms, rope, activations and biases are not counted.
"""
import math
from typing import Any, NamedTuple

from xtf import tree
from xtf.spec import Param, is_matrix

# what attention reads, and its output's axis is the first of
ATTENTION = ("heads", "kv_heads", "head_dim")


class Work(NamedTuple):
    """FLOPs of forward and of backward; `needs`: whether what comes out needs a gradient; `attention`: whether what
    attention is given does."""
    forward: float
    backward: float
    needs: bool
    attention: bool = False

    @property
    def both(self) -> float:
        return self.forward + self.backward


def trained(node: tree.Tree) -> bool:
    """Whether any leaf below is."""
    return any(p.trainable for p in tree.leaves(node))


def product(node: dict, needs: bool, tokens: float) -> Work:
    """A product of `tokens` rows with a node's weight, its adapters included; `needs`: whether the rows need a
    gradient.

    >>> import torch
    >>> weight = Param((8, 4), torch.float32, ("mlp", "embed"))
    >>> product({"weight": weight}, needs=False, tokens=10)
    Work(forward=640.0, backward=640.0, needs=True, attention=False)
    """
    forward = backward = 0.0
    narrow = needs
    for name in ("weight", "lora_a", "lora_b"):
        if name in node:
            p = node[name]
            cost = 2.0 * tokens * math.prod(p.shape[-2:])                    # of stacked experts one
            reads = narrow if name == "lora_b" else needs
            forward, backward = forward + cost, backward + cost * (reads + p.trainable)
            narrow = reads or p.trainable
    return Work(forward, backward, needs or trained(node))


def layer(p: dict, needs: bool, tokens: float, top_k: int = 0, routed: float | None = None) -> Work:
    """The products of one layer over `tokens`, of which `routed` (all, by default) go to `top_k` experts each.

    Attention's own products are left out: they have no weights (see `Work.attention`).
    """
    return _walk(p, {"embed": needs}, tokens, top_k * (tokens if routed is None else routed))[0]


def _walk(p: dict, reads: dict[str, bool], tokens: float, pairs: float) -> tuple[Work, dict[str, bool]]:
    """The work of a node's nodes, and what of each axis needs a gradient afterwards."""
    forward = backward = 0.0
    attention, stream = False, reads["embed"]
    p = {name: {"weight": node} if isinstance(node, Param) else node for name, node in p.items()}
    for node in p.values():                          # norms by head, sinks: wherever they stand among the products
        axes = _vector(node)
        if axes and axes[0] != "embed":
            reads[axes[0]] = reads.get(axes[0], False) or trained(node)
    for name, node in p.items():
        if axes := _vector(node):
            if axes[0] == "embed":                   # a norm of the stream
                reads["embed"] = stream = stream or trained(node)
            continue
        weight = node.get("weight")
        if weight is None:
            # experts, or any other node of nodes; the router's weights multiply rows within the experts, or where these
            # have biases what comes out
            inside, rows = {"embed": reads["embed"]}, tokens
            if name == "experts":
                rows = pairs
                inside["mlp"] = reads.get("router", False) and not any("bias" in child for child in node.values())
            work, seen = _walk(node, inside, rows, pairs)
            stream = stream or work.needs or (name == "experts" and reads.get("router", False))
            reads |= {axis: reads.get(axis, False) or seen[axis] for axis in seen if axis != "embed"}
        else:
            out, into = weight.axes[-2:]
            given = any(reads.get(axis, False) for axis in (ATTENTION if into == "heads" else (into,)))
            work = product(node, given, tokens)
            attention = attention or (given and into == "heads")
            if out == "embed":
                stream = stream or work.needs
            else:
                reads[out] = reads.get(out, False) or work.needs
        forward, backward, attention = forward + work.forward, backward + work.backward, attention or work.attention
    return Work(forward, backward, stream, attention), reads


def _vector(node: Any) -> tuple[str, ...] | None:
    """The axes of a node that multiplies nothing: a norm, sinks, a correction."""
    leaves = [p for p in node.values() if isinstance(p, Param)]
    return leaves[0].axes if leaves and not any(map(is_matrix, leaves)) else None


def pairs(length: int, window: int | None = None) -> int:
    """How many keys the queries of a document see, all together.

    >>> pairs(4), pairs(4, window=2)
    (10, 7)
    """
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w
