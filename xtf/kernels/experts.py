"""Tokens to their experts and back, in one process: the meaning that the expert-parallel version keeps.

    plan = plan(experts_TK, E)                       # who goes where: integers alone
    rows = arrive(dispatch(x_TD, weights_TK, plan))  # one row a (token, expert) pair, laid out by expert
    y_TD = home(combine(y_ND, rows))                 # each token's rows summed

The four moves are cut where messages fly when experts live on other ranks: `dispatch` and `combine` start, `arrive` and `home` wait.

T tokens   D hidden   E experts   K choices of a token   N (token, expert) pairs   F features out
"""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Plan(NamedTuple):
    """Pairs sorted by expert: pair n is choice `pairs_N[n] % K` of token `pairs_N[n] // K`."""
    pairs_N: torch.Tensor
    offsets_E: torch.Tensor
    num_tokens: int
    top_k: int


class Rows(NamedTuple):
    """What the experts see: rows by expert, each pair's weight, where each expert's rows end; `plan` is the way back."""
    x_ND: torch.Tensor
    weights_N: torch.Tensor
    offsets_E: torch.Tensor
    plan: Plan


def grouped_linear(x_ND: torch.Tensor, node: dict, offsets_E: torch.Tensor, axes: tuple[str, str] | None = None) -> torch.Tensor:
    """Rows `offsets_E[e - 1]:offsets_E[e]` times expert e's weight: `node["weight"]` [E, F, D], optional `node["bias"]` [E, F].

    Rows past the last offset come out as zeros. `axes` = (in, out) logical names, for wrappers. Raises ValueError if the weight
    does not hold one matrix an offset.

    >>> weight = torch.stack([torch.eye(2), 10 * torch.eye(2)])
    >>> grouped_linear(torch.ones(3, 2), {"weight": weight}, torch.tensor([1, 3]))[:, 0].tolist()
    [1.0, 10.0, 10.0]
    """
    weight_EFD, bias_EF = node["weight"], node.get("bias")
    ends = offsets_E.tolist()
    if len(weight_EFD) != len(ends):
        raise ValueError(f"grouped_linear {axes}: {len(ends)} offsets but a weight of {len(weight_EFD)} experts; they must be one to one")
    out, start = [], 0
    for e, end in enumerate(ends):
        out.append(F.linear(x_ND[start:end], weight_EFD[e], None if bias_EF is None else bias_EF[e].to(x_ND.dtype)))
        start = end
    return torch.cat([*out, x_ND.new_zeros(len(x_ND) - start, weight_EFD.shape[1])])


def plan(experts_TK: torch.Tensor, num_experts: int) -> Plan:
    """Sort the (token, choice) pairs by expert. `experts_TK` holds expert ids, -1 where nobody is chosen.

    Raises ValueError at ids outside [-1, num_experts).

    >>> plan(torch.tensor([[1, 0], [1, -1]]), 2).offsets_E.tolist()
    [1, 3]
    """
    flat = experts_TK.flatten()
    if flat.numel() and not (flat.min() >= -1 and flat.max() < num_experts):
        raise ValueError(f"plan: expert ids in [{int(flat.min())}, {int(flat.max())}], but there are {num_experts} experts; -1 means nobody")
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    pairs_N = flat.argsort(stable=True)[counts[0]:]
    return Plan(pairs_N, counts[1:].cumsum(0), *experts_TK.shape)


def dispatch(x_TD: torch.Tensor, weights_TK: torch.Tensor, plan: Plan) -> Any:
    """Start each token's row and weights on their way. Returns a flight for `arrive`."""
    return x_TD, weights_TK, plan


def arrive(flight: Any) -> Rows:
    """The rows, laid out by expert."""
    x_TD, weights_TK, plan = flight
    x_ND = x_TD.index_select(0, plan.pairs_N // plan.top_k)
    return Rows(x_ND, weights_TK.reshape(-1).index_select(0, plan.pairs_N), plan.offsets_E, plan)


def combine(y_ND: torch.Tensor, rows: Rows) -> Any:
    """Start the experts' outputs on their way home. Returns a flight for `home`.

    `y_ND` already carries `rows.weights_N`: multiplied into the narrow hidden rows (or the outputs, where there is a bias), so that
    the way home is a sum and saves nothing.
    """
    return y_ND, rows.plan


def home(flight: Any) -> torch.Tensor:
    """The sum, for each token, over the rows of the experts that it chose; zeros where nobody was chosen."""
    y_ND, plan = flight
    return y_ND.new_zeros(plan.num_tokens, y_ND.shape[1]).index_add(0, plan.pairs_N // plan.top_k, y_ND)
