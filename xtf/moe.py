"""A dropless mixture of experts, in stages: score → choose → weigh → announce → dispatch → experts → combine → home.

`layer` is a generator that yields wherever messages fly, so that a scheduler may run another micro-batch meanwhile
(`overlap`) without a second copy of forward; `staged` makes a plain block of one. What the routers did comes out as
sums, so balancing losses are shares like any other loss: linear in the probabilities, given the counts.

In the field's words score, choose and weigh are the gate; `dispatch` and `arrive` permute tokens by expert and send
them in an all-to-all; the experts are a grouped GEMM; `combine` and `home` are the all-to-all back and unpermute. There
is no capacity factor, and nothing is dropped.

P packs   t positions here   W positions of a whole pack   T tokens here (P × t)   D hidden   E experts
K chosen a token   S documents of a pack   L layers with experts   N (token, expert) pairs computed here
F expert width
"""
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from xtf import device, tree
from xtf.data.batch import Batch
from xtf.kernels import at_least_float32
from xtf.kernels.swiglu import weighted_swiglu
from xtf.layout import part_like
from xtf.ops import LOCAL, ExpertRows, Ops


class Router(NamedTuple):
    """How tokens choose experts.

    score: "softmax" over all experts (Qwen3); "softmax_top_k" over the chosen ones (GPT-OSS); "sigmoid" of each, the
    choice corrected by a bias and limited to `top_groups` of `groups` by the sum of each group's best two (DeepSeek V3,
    arXiv 2412.19437, eq. 12 to 16).
    normalise: divide the chosen scores by their sum. scale: multiply them.
    """
    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_top_k"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


class Routing(NamedTuple):
    """What the routers of all layers did here; all but `experts` are sums over tokens: they add over packs and ranks.

    counts_LPSE: pairs that each document sent to each expert.
    probs_LPSE: the sum of its tokens' probabilities (with gradient).
    z_LP: the sum of logsumexp(logits)² (with gradient).
    entropy_LP: the sum of the probabilities' entropies, in nats.
    tokens_P: tokens that are not padding.
    dropped_LP: pairs that a static bound left out.
    experts: for each layer the choice, [P, t, K] int16, -1 at padding.
    """
    counts_LPSE: torch.Tensor
    probs_LPSE: torch.Tensor
    z_LP: torch.Tensor
    entropy_LP: torch.Tensor
    tokens_P: torch.Tensor
    dropped_LP: torch.Tensor
    experts: list[torch.Tensor]


# ---- the router: three small functions; a replay replaces `choose` alone, so that weights keep their gradients -------

def score(node: dict, x_TD: torch.Tensor, router: Router, ops: Ops) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, probabilities or sigmoids), both [T, E] in at least float32."""
    wide = at_least_float32(x_TD.dtype)
    logits_TE = ops.linear(x_TD.to(wide), {k: v.to(wide) for k, v in node.items()}, ("embed", "router"))
    return logits_TE, logits_TE.sigmoid() if router.score == "sigmoid" else logits_TE.softmax(-1)


@torch.no_grad()
def choose(scores_TE: torch.Tensor, bias_E: torch.Tensor | None, router: Router) -> torch.Tensor:
    """The experts of each token, [T, K]: integers, without gradient.

    >>> choose(torch.tensor([[0.1, 0.7, 0.2]]), None, Router(3, 2)).tolist()
    [[1, 2]]
    """
    if bias_E is not None:
        scores_TE = scores_TE + bias_E
    if router.groups > 1:
        by_group = scores_TE.unflatten(-1, (router.groups, -1))
        best = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1).topk(router.top_groups, -1).indices
        keep = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(1, best, True)
        scores_TE = by_group.masked_fill(~keep[..., None], -torch.inf).flatten(1)
    return scores_TE.topk(router.top_k, -1).indices


def weigh(logits_TE: torch.Tensor, scores_TE: torch.Tensor, experts_TK: torch.Tensor, router: Router) -> torch.Tensor:
    """What each chosen expert's output is multiplied by, [T, K]; 0 where nobody (-1) is chosen.

    >>> scores = torch.tensor([[0.1, 0.7, 0.2]])
    >>> weigh(scores.log(), scores, torch.tensor([[1, -1]]), Router(3, 2)).tolist() == [[scores[0, 1].item(), 0.0]]
    True
    """
    there, at = experts_TK >= 0, experts_TK.clamp(min=0)
    if router.score == "softmax_top_k":
        chosen_TK = logits_TE.gather(1, at)
        return chosen_TK.masked_fill(~there, torch.finfo(chosen_TK.dtype).min).softmax(-1) * there
    weights_TK = scores_TE.gather(1, at) * there
    if router.normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * router.scale


def replays(routes: Sequence[torch.Tensor] | None, layers: Sequence[dict], ops: Ops) -> list[torch.Tensor | None]:
    """For each layer the recorded choice [P, t, K] to replay: None where it has no experts, or without `routes`.

    `routes` has one [P, W, K] of whole packs for each layer with experts; raises ValueError if there are more or fewer.
    """
    sparse = ["router" in p for p in layers]
    if routes is None:
        return [None] * len(layers)
    if len(routes) != sum(sparse):
        raise ValueError(f"routes: {len(routes)} recorded layers for the {sum(sparse)} of this model's {len(layers)} "
                         "layers that have experts")
    recorded = iter(routes)
    return [ops.split(next(recorded)) if s else None for s in sparse]


# ---- the layer -------------------------------------------------------------------------------------------------------

def staged(stages: Callable[..., Generator]) -> Callable[..., Any]:
    """A block whose stages may be interleaved with another's; called, it runs them in turn. `.stages` is the generator.

    It yields None wherever messages fly, and last its result (torch.compile knows nothing of what a generator returns).

    >>> @staged
    ... def block(x):
    ...     yield
    ...     yield x + 1
    >>> block(1)
    2
    """
    @functools.wraps(stages)
    def block(*args: Any, **kwargs: Any) -> Any:
        return interleave(stages(*args, **kwargs))[0]
    block.stages = stages  # pyright: ignore
    return block


def interleave(*running: Generator) -> list[Any]:
    """Run generators in turns, each to its next yield; returns what each yielded last."""
    results: list[Any] = [None] * len(running)
    live = list(range(len(running)))
    while live:
        for i in tuple(live):
            try:
                results[i] = next(running[i])
            except StopIteration:
                live.remove(i)
    return results


class Experts(Protocol):
    """What one layer's experts make of rows that are laid out by expert."""
    def __call__(self, p: dict, rows: ExpertRows, *, ops: Ops) -> torch.Tensor: ...


def layer(p: dict, h_PtD: torch.Tensor, documents_Pt: torch.Tensor, num_documents: int, router: Router, ops: Ops, *,
          onto: torch.Tensor, experts: Experts, shared: Callable[[], torch.Tensor] | None = None,
          routes: torch.Tensor | None = None) -> Generator[Any, None, None]:
    """Yields last: (onto + the experts' sum, [P, t, D]; the router's layer of `Routing`, by field, packs in front).

    `p` has "router", "experts" and, where the choice is corrected, "correction". `documents_Pt` as `documents` gives
    it: padding goes to nobody and is not counted. `experts(p["experts"], rows, ops=ops)` -> [N, D], each row already
    times `rows.weights_N`. `shared()` [P, t, D] is added, and computed while the rows fly. `routes` [P, t, K] replays a
    recorded choice.
    """
    # the gate
    x_TD, documents_T = h_PtD.flatten(0, 1), documents_Pt.flatten()
    logits_TE, scores_TE = score(p["router"], x_TD, router, ops)
    if routes is None:
        bias_E = p["correction"]["bias"] if "correction" in p else None
        experts_TK = ops.name(choose, "routes")(scores_TE.detach(), bias_E, router)
    else:
        experts_TK = routes.flatten(0, 1).long()
    experts_TK = experts_TK.masked_fill((documents_T < 0)[:, None], -1)
    announced = ops.name(ops.announce, "routes")(experts_TK, router.num_experts)     # counts, to know sizes
    yield
    # permute, all-to-all
    flight = ops.dispatch(x_TD, weigh(logits_TE, scores_TE, experts_TK, router), announced)
    y_PtD = shared() if shared is not None else None
    yield
    rows = ops.arrive(flight)
    # before the message home, so that remat's recomputation ends there
    routed = statistics(logits_TE, scores_TE, experts_TK, documents_Pt, num_documents, rows.dropped)
    # grouped GEMMs, all-to-all back
    flight = ops.combine(experts(p["experts"], rows, ops=ops), rows)
    yield
    onto = onto if y_PtD is None else onto + y_PtD
    # unpermute: each token's rows summed
    yield onto + ops.home(flight).view_as(onto), routed


def swiglu_experts(p: dict, rows: ExpertRows, ops: Ops) -> torch.Tensor:
    """down(silu(gate x) * up x * weight) of every row: weighted while narrow, so that the way home is a mere sum."""
    gate_NF = ops.grouped_linear(rows.x_ND, p["gate"], rows.offsets_E, ("embed", "mlp"))
    up_NF = ops.grouped_linear(rows.x_ND, p["up"], rows.offsets_E, ("embed", "mlp"))
    return ops.grouped_linear(weighted_swiglu(gate_NF, up_NF, rows.weights_N), p["down"], rows.offsets_E,
                              ("mlp", "embed"))


# ---- what the router did ---------------------------------------------------------------------------------------------

def documents(batch: Batch, ops: Ops) -> torch.Tensor:
    """The index of each position's document in its pack, [P, t] int64, -1 at padding; split as the model's positions.

    >>> from xtf.data import Sample, pack
    >>> from xtf.ops import LOCAL
    >>> documents(pack([Sample([5, 6], [0, 1]), Sample([7], [1])], seq_len=5, max_documents=3), LOCAL).tolist()
    [[0, 0, 1, -1, -1]]
    """
    P, W = batch.input_ids.shape
    position_PW = torch.arange(W, device=batch.segments.device).expand(P, W).contiguous()
    index_PW = torch.searchsorted(batch.segments[:, 1:].long().contiguous(), position_PW, right=True)
    return ops.split(index_PW.masked_fill(position_PW >= batch.lengths[:, None], -1))


def num_tokens(batch: Batch, ops: Ops) -> torch.Tensor:
    """How many tokens of the whole global batch are no padding (or 1): balancing and z-losses are divided by it."""
    return ops.total((documents(batch, ops) >= 0).sum()).clamp(min=1)


def statistics(logits_TE: torch.Tensor, scores_TE: torch.Tensor, experts_TK: torch.Tensor, documents_Pt: torch.Tensor,
               num_documents: int, dropped: torch.Tensor) -> dict[str, torch.Tensor]:
    """One layer of `Routing`, by field."""
    (P, t), E = documents_Pt.shape, scores_TE.shape[1]
    real_Pt = documents_Pt >= 0
    bins = P * num_documents                                                     # one more for padding
    pack_P1 = torch.arange(P, device=documents_Pt.device)[:, None]
    bin_T = torch.where(real_Pt, pack_P1 * num_documents + documents_Pt, bins).flatten()
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    at_TK = torch.where(experts_TK >= 0, bin_T[:, None] * E + experts_TK, bins * E)
    counts = torch.zeros((bins + 1) * E, dtype=scores_TE.dtype, device=at_TK.device).index_add(
        0, at_TK.flatten(), torch.ones_like(at_TK, dtype=scores_TE.dtype).flatten())
    probs = torch.zeros(bins + 1, E, dtype=scores_TE.dtype, device=at_TK.device).index_add(0, bin_T, probs_TE)
    by_pack = lambda x_T: (x_T.view(P, t) * real_Pt).sum(1)
    shape = P, num_documents, E
    return {"counts": counts.view(bins + 1, E)[:bins].view(shape), "probs": probs[:bins].view(shape),
            "z": by_pack(logits_TE.logsumexp(-1).square()),
            "entropy": -by_pack(torch.special.xlogy(probs_TE.detach(), probs_TE.detach()).sum(-1)),
            "tokens": real_Pt.sum(1), "dropped": F.pad(dropped.view(1), (0, P - 1)),
            "experts": experts_TK.view(P, t, -1).to(torch.int16)}


def gather(ys: Sequence[dict | None]) -> Routing:
    """`scan`'s ys, of which dense layers' are None, as one `Routing`. Raises ValueError if no layer has experts."""
    layers = [y for y in ys if y is not None]
    if not layers:
        raise ValueError("moe.gather: no layer of this model has experts")
    stacked = lambda name: torch.stack([y[name] for y in layers])
    return Routing(stacked("counts"), stacked("probs"), stacked("z"), stacked("entropy"), layers[0]["tokens"],
                   stacked("dropped"), [y["experts"] for y in layers])


def balance(routing: Routing, num_tokens: torch.Tensor, ops: Ops,
            over: Literal["document", "batch", "pack", "transformers"] = "document",
            previous_LE: torch.Tensor | None = None) -> torch.Tensor:
    """This rank's share of the balancing loss, summed over layers: 1 a layer if use is even, up to E if one does all.

    Σ over documents of (tokens / num_tokens) × E Σ_e f_e p_e, with f_e the fraction of the document's pairs that expert
    e got and p_e its mean probability: the document's loss of DeepSeek V3 (arXiv 2412.19437, eq. 17 to 20),
    token-weighted. Counts carry no gradient, and are summed over the ranks that hold other positions. `num_tokens` as
    `moe.num_tokens` gives it.

    over: "document" (the default). "batch": f of the whole global batch of the step before, `previous_LE` (counts; the
    first step's zeros mean even use). "pack": f of whole packs, so that a document's neighbours matter. "transformers":
    the formula of its load_balancing_loss_func, all layers' tokens thrown together and not divided by K, over this
    micro-batch of this rank: a product of two means, so not a sum of shares; for parity on one process.

    Raises ValueError where `previous_LE` and `over` do not go together.
    """
    if over not in ("document", "batch", "pack", "transformers"):
        raise ValueError(f"moe.balance: over={over!r} is none of document, batch, pack, transformers")
    if (over == "batch") != (previous_LE is not None):
        raise ValueError(f"moe.balance: over={over!r} {'needs' if over == 'batch' else 'takes no'} previous_LE, the "
                         "counts of the step before")
    E = routing.counts_LPSE.shape[-1]
    if over == "transformers":
        tokens = routing.tokens_P.sum() * len(routing.counts_LPSE)
        counts_E, probs_E = routing.counts_LPSE.sum((0, 1, 2)), routing.probs_LPSE.sum((0, 1, 2))
        return E * (counts_E * probs_E).sum() / tokens ** 2
    if previous_LE is not None:
        even_LE = torch.where(previous_LE.sum(-1, keepdim=True) > 0, previous_LE, 1.0)
        counts_LPSE = even_LE[:, None, None]
    else:
        counts_LPSE = ops.same_packs(routing.counts_LPSE.detach())
        if over == "pack":
            counts_LPSE = counts_LPSE.sum(2, keepdim=True)
    fractions_LPSE = counts_LPSE / counts_LPSE.sum(-1, keepdim=True).clamp(min=1)
    return E * (fractions_LPSE * routing.probs_LPSE).sum() / num_tokens


def z_loss(routing: Routing, num_tokens: torch.Tensor) -> torch.Tensor:
    """This rank's share of the mean of logsumexp(logits)², summed over layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return routing.z_LP.sum() / num_tokens


def sums(routing: Routing) -> dict[str, torch.Tensor]:
    """What to return beside the share, to be added over micro-batches and ranks: counts [L, E], scalars [L]."""
    return {"counts": routing.counts_LPSE.detach().sum((1, 2)), "z": routing.z_LP.detach().sum(1),
            "entropy": routing.entropy_LP.sum(1), "tokens": routing.tokens_P.sum(), "dropped": routing.dropped_LP.sum()}


def no_counts(specs: tree.Tree) -> torch.Tensor:
    """Counts of no step yet, zeros [L, E] in at least float32: what `extra` begins with for `balance(over="batch")`.

    >>> from xtf.spec import Param
    >>> router = {"router": {"weight": Param((4, 8), torch.float32, ("router", "embed"))}}
    >>> no_counts({"layers": [{}, router, router]}).shape
    torch.Size([2, 4])
    """
    routers = [p for path, p in tree.flatten_with_path(specs) if path.endswith("router.weight")]
    if not routers:
        raise ValueError("moe: no layer of this model has experts; use the recipe of a dense family, or correct "
                         "config.json")
    return torch.zeros(len(routers), routers[0].shape[0], dtype=at_least_float32(routers[0].dtype),
                       device=device.device())


def metrics(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars for the log, from the step's `sums`.

    router_violation: by how much the fullest expert of any layer exceeds its even share, (max - mean) / mean.
    router_load_min: the emptiest expert's part of its even share. router_entropy: nats a token and layer.
    router_z: mean logsumexp². dropped: pairs that were left out.

    >>> even = {"counts": torch.ones(1, 4), "z": torch.ones(1), "entropy": torch.ones(1), "tokens": torch.tensor(2),
    ...         "dropped": torch.tensor(0)}
    >>> metrics(even)["router_violation"].item()
    0.0
    """
    counts_LE = sums["counts"]
    mean_L1 = counts_LE.mean(-1, keepdim=True).clamp(min=torch.finfo(counts_LE.dtype).tiny)
    tokens = sums["tokens"].clamp(min=1)
    return {"router_violation": (counts_LE / mean_L1).max() - 1, "router_load_min": (counts_LE / mean_L1).min(),
            "router_entropy": sums["entropy"].mean() / tokens, "router_z": sums["z"].mean() / tokens,
            "dropped": sums["dropped"]}


def correct(updates: tree.Tree, params: tree.Tree, counts_LE: torch.Tensor, rate: float, ops: Ops = LOCAL,
            ok: torch.Tensor | None = None) -> tree.Tree:
    """`updates` with the corrections': + rate for experts below their layer's mean count, - rate above (0 if not `ok`).

    No gradient reaches a correction: it steers the choice alone, so that no auxiliary loss is needed (arXiv 2408.15664,
    Algorithm 1). Raises ValueError if the layers with corrections are not as many as the rows of `counts_LE`.
    """
    delta_LE = rate * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE)
    ok = ops.sound(ok)
    if ok is not None:
        delta_LE = torch.where(ok, delta_LE, 0.0)
    rows = iter(delta_LE)
    count = sum(path.endswith("correction.bias") for path, _ in tree.flatten_with_path(params))
    if count != len(delta_LE):
        raise ValueError(f"moe.correct: counts of {len(delta_LE)} layers for {count} layers with a correction")
    moved = lambda path, p, u: part_like(next(rows).to(p.dtype), p) if path.endswith("correction.bias") else u
    return tree.map_with_path(moved, params, updates)
