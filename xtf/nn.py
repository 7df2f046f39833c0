"""What decoders share: rotary embeddings of every scaling kind, attention and MLP, the head and its losses, counts.

All are functions of a node or layer of the parameter tree; whatever concerns the machine goes through `ops`.

P packs   T positions of a pack   t positions here   S documents (and one more where their lengths are cumulative)
D hidden   H query heads   K key-value heads   d head dim   F mlp or expert width   V vocabulary   E experts
N (token, expert) pairs
"""
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Protocol

import msgspec
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from xtf import flops as count
from xtf import moe, tree
from xtf.data.batch import Batch
from xtf.kernels import at_least_float32
from xtf.kernels.cross_entropy import linear_cross_entropy, token_logprobs
from xtf.kernels.rms_norm import rms_norm
from xtf.kernels.rope import apply_rope
from xtf.kernels.swiglu import swiglu
from xtf.ops import LOCAL, ExpertRows, Ops
from xtf.spec import ONES, ZEROS, Normal, Param

Size = Annotated[int, msgspec.Meta(ge=1)]

# transformers' names for what torch has as one function; "silu" alone has a fused kernel
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "gelu_python": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"), "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish, "mish": F.mish, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}


# ---- rotary position embeddings --------------------------------------------------------------------------------------

class Rope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="rope_type", tag="default"):
    """Rotary positions without scaling; the other kinds add fields, named as in config.json.

    Source: Su et al., arXiv 2104.09864.
    """
    rope_theta: float = 10000.0


class LinearRope(Rope, frozen=True, tag="linear"):
    """Positions divided by `factor` (arXiv 2306.15595)."""
    factor: float


class DynamicRope(Rope, frozen=True, tag="dynamic"):
    """NTK-aware: documents longer than `max_position_embeddings` get a larger base, by their length."""
    factor: float
    max_position_embeddings: Size


class YarnRope(Rope, frozen=True, tag="yarn"):
    """Slow dims interpolated, fast ones kept, a ramp between (arXiv 2309.00071, eq. 15 to 25).

    Cos and sin are scaled by `attention_factor`.
    """
    factor: float
    original_max_position_embeddings: Size
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class LongRope(Rope, frozen=True, tag="longrope"):
    """A factor a dim, from a table for documents up to the original length or one for longer (arXiv 2402.13753)."""
    factor: float
    original_max_position_embeddings: Size
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None


class Llama3Rope(Rope, frozen=True, tag="llama3"):
    """Wavelengths beyond the original context slowed by `factor`, with a smooth passage (arXiv 2407.21783)."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: Size


AnyRope = Rope | LinearRope | DynamicRope | YarnRope | LongRope | Llama3Rope


def rope(kind: AnyRope, head_dim: int, positions_PT: torch.Tensor, segments_PS: torch.Tensor,
         dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [P, T, head_dim] of every position, in at least float32, once a forward.

    `segments_PS` holds cumulative document lengths: kinds that depend on the length use each document's own, so that
    packing is invisible. Frequencies are float32 numbers in any `dtype`, as they are in transformers.

    >>> cos, sin = rope(Rope(), 4, torch.tensor([[0, 1, 2]]), torch.tensor([[0, 3]]), torch.float32)
    >>> cos.shape, cos[0, 0].tolist()
    (torch.Size([1, 3, 4]), [1.0, 1.0, 1.0, 1.0])
    """
    wide = at_least_float32(dtype)
    radians = inverse_frequencies(kind, head_dim, segments_PS, positions_PT.shape[1])
    angle = positions_PT[..., None].to(wide) * radians.to(wide)
    scale = attention_factor(kind)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def inverse_frequencies(kind: AnyRope, head_dim: int, segments_PS: torch.Tensor, T: int) -> torch.Tensor:
    """Radians a position, float32: [head_dim / 2], or [P, T, head_dim / 2] where they depend on a document's length.

    Computed on the CPU where the length plays no part: a last-digit difference in a device's pow is 1e-3 radians at
    position 30,000. An accelerator keeps what it was sent: each copy from unpinned memory would wait for it.
    """
    device = segments_PS.device
    if type(segments_PS) is torch.Tensor and device.type not in ("cpu", "meta"):
        tables = _tables_on(kind, head_dim, device)
    else:
        tables = tuple(x.to(device) for x in _tables(kind, head_dim))
    match kind:
        case DynamicRope(factor=factor, max_position_embeddings=most):
            # powers in float64: float32's round by where a number stands in the tensor, so by a document's neighbours
            lengths_PT = document_lengths(segments_PS, T).double()
            growth_PT = torch.where(lengths_PT > most, factor * lengths_PT / most - (factor - 1), 1.0)
            theta_PT = kind.rope_theta * growth_PT ** (head_dim / (head_dim - 2))
            return 1.0 / (theta_PT[..., None] ** tables[0].double()).float()
        case LongRope():
            longer_PT1 = (document_lengths(segments_PS, T) > kind.original_max_position_embeddings)[..., None]
            return torch.where(longer_PT1, tables[1], tables[0])
        case _:
            return tables[0]


@cache
def _tables_on(kind: AnyRope, head_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False), _disable_current_modes():
        return tuple(x.to(device) for x in _tables(kind, head_dim))


def _tables(kind: AnyRope, head_dim: int) -> tuple[torch.Tensor, ...]:
    """What of the frequencies no document changes, float32 [head_dim / 2] on the CPU: the frequencies themselves; for
    `DynamicRope` the powers of the base; for `LongRope` those of short documents and of long ones."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    periods = kind.rope_theta ** powers
    plain = 1.0 / periods
    match kind:
        case LinearRope(factor=factor):
            return (plain / factor,)
        case DynamicRope():
            return (powers,)
        case YarnRope():
            low, high = (yarn_dim(kind, rotations, head_dim) for rotations in (kind.beta_fast, kind.beta_slow))
            if kind.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            dims = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
            keep = 1 - ((dims - low) / (high - low or 0.001)).clamp(0, 1)
            return (1.0 / (kind.factor * periods) * (1 - keep) + plain * keep,)
        case LongRope():
            return tuple(1.0 / (torch.tensor(x, dtype=torch.float32, device="cpu") * periods)
                         for x in (kind.short_factor, kind.long_factor))
        case Llama3Rope(factor=factor, low_freq_factor=low, high_freq_factor=high,
                        original_max_position_embeddings=original):
            wavelength = 2 * math.pi / plain
            smooth = (original / wavelength - low) / (high - low)
            between = (1 - smooth) * plain / factor + smooth * plain
            slow = torch.where(wavelength > original / low, plain / factor, between)
            return (torch.where(wavelength < original / high, plain, slow),)
        case _:
            return (plain,)


def yarn_dim(kind: YarnRope, rotations: float, head_dim: int) -> float:
    """The (fractional) dim that turns `rotations` times within the original context."""
    turns = kind.original_max_position_embeddings / (rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(kind.rope_theta))


def attention_factor(kind: AnyRope) -> float:
    """What cos and sin are multiplied by: 1 except for yarn and longrope.

    >>> attention_factor(Rope()), attention_factor(YarnRope(factor=math.e, original_max_position_embeddings=64))
    (1.0, 1.1)
    """
    match kind:
        case YarnRope() | LongRope() if kind.attention_factor is not None:
            return kind.attention_factor
        case YarnRope(factor=factor):
            if kind.mscale and kind.mscale_all_dim:
                return yarn_gain(factor, kind.mscale) / yarn_gain(factor, kind.mscale_all_dim)
            return yarn_gain(factor, 1.0)
        case LongRope(factor=factor) if factor > 1:
            return math.sqrt(1 + math.log(factor) / math.log(kind.original_max_position_embeddings))
        case _:
            return 1.0


def yarn_gain(factor: float, mscale: float) -> float:
    """By how much YaRN sharpens attention where positions are stretched by `factor` (arXiv 2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def document_lengths(segments_PS: torch.Tensor, T: int) -> torch.Tensor:
    """[P, T]: at each position the length of its document.

    >>> document_lengths(torch.tensor([[0, 2, 5, 5]]), 5).tolist()
    [[2, 2, 3, 3, 3]]
    """
    ends_PS, lengths_PS = segments_PS[:, 1:].long(), segments_PS.diff(dim=1)
    ends_here_PT = torch.zeros_like(ends_PS[:, :1]).expand(-1, T + 1).scatter_add(1, ends_PS, torch.ones_like(ends_PS))
    return lengths_PS.gather(1, ends_here_PT.cumsum(1)[:, :T])


# ---- what is read of a config ----------------------------------------------------------------------------------------

class ModelConfig(Protocol):
    """What the `Config` of every family has, whatever else it has; fields are named as in config.json."""
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def rope(self) -> AnyRope: ...
    @property
    def pad_token_id(self) -> int | None: ...


# ---- layers ----------------------------------------------------------------------------------------------------------

def norm(x_PtD: torch.Tensor, node: dict, cfg: ModelConfig) -> torch.Tensor:
    """RMSNorm over the last dim."""
    return rms_norm(x_PtD, node["weight"], cfg.rms_norm_eps)


def embed(node: dict, ids_Pt: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    """Rows of the table. As in transformers, looking up the padding token sends no gradient to its row."""
    return F.embedding(ids_Pt, node["weight"], padding_idx=cfg.pad_token_id)


def attention(p: dict, x_PtD: torch.Tensor, cos_Ptd: torch.Tensor, sin_Ptd: torch.Tensor, segments_PS: torch.Tensor,
              window: int | None, cfg: ModelConfig, ops: Ops) -> torch.Tensor:
    """Causal grouped-query attention of one layer `p`; q and k are normed by head where the layer has `q_norm` and
    `k_norm`, and every query sees a sink where it has `sinks`.

    `window`: how many tokens a query sees, itself included; None: its whole document. How many heads there are is read
    off the products, since a transform may have split them.
    """
    heads = lambda name, axis: ops.linear(x_PtD, p[name], ("embed", axis)).unflatten(-1, (-1, cfg.head_dim))
    q_PtHd, k_PtKd, v_PtKd = heads("q", "heads"), heads("k", "kv_heads"), heads("v", "kv_heads")
    if "q_norm" in p:
        q_PtHd, k_PtKd = norm(q_PtHd, p["q_norm"], cfg), norm(k_PtKd, p["k_norm"], cfg)
    q_PtHd, k_PtKd = apply_rope(q_PtHd, cos_Ptd, sin_Ptd), apply_rope(k_PtKd, cos_Ptd, sin_Ptd)
    sinks_H = p["sinks"]["weight"] if "sinks" in p else None
    o_PtHd = ops.name(ops.attend, "attn_out")(q_PtHd, k_PtKd, v_PtKd, segments=segments_PS, window=window,
                                              sinks=sinks_H)
    return ops.linear(o_PtHd.flatten(-2), p["o"], ("heads", "embed"))


def mlp(p: dict, x_PtD: torch.Tensor, cfg: ModelConfig, ops: Ops) -> torch.Tensor:
    """The gated MLP of one layer `p`: down(act(gate x) * up x)."""
    gate_PtF, up_PtF = ops.linear(x_PtD, p["gate"], ("embed", "mlp")), ops.linear(x_PtD, p["up"], ("embed", "mlp"))
    if cfg.hidden_act in ("silu", "swish"):
        hidden_PtF = swiglu(gate_PtF, up_PtF)
    else:
        hidden_PtF = ACTIVATIONS[cfg.hidden_act](gate_PtF) * up_PtF
    return ops.linear(hidden_PtF, p["down"], ("mlp", "embed"))


def experts(p: dict, rows: ExpertRows, cfg: ModelConfig, ops: Ops) -> torch.Tensor:
    """`mlp` for rows laid out by expert, [N, D], each times its weight."""
    if cfg.hidden_act in ("silu", "swish"):
        return moe.swiglu_experts(p, rows, ops)
    gate_NF, up_NF = (ops.grouped_linear(rows.x_ND, p[name], rows.offsets_E, ("embed", "mlp"))
                      for name in ("gate", "up"))
    hidden_NF = (ACTIVATIONS[cfg.hidden_act](gate_NF) * up_NF * rows.weights_N[:, None]).to(gate_NF.dtype)
    return ops.grouped_linear(hidden_NF, p["down"], rows.offsets_E, ("mlp", "embed"))


# ---- the end: final norm, head, losses -------------------------------------------------------------------------------
# Each takes what the last layer returned. The final norm and the head are made whole together; a tied head is the
# embedding, made whole a second time.

def final_norm(params: dict, x_PtD: torch.Tensor, cfg: ModelConfig, ops: Ops) -> torch.Tensor:
    """What the head sees."""
    return ops.use(partial(_normed, cfg=cfg), params["norm"], x_PtD)


def logits(params: dict, x_PtD: torch.Tensor, cfg: ModelConfig, ops: Ops) -> torch.Tensor:
    """Logits of every position, [P, t, V]."""
    return ops.use(partial(_logits, cfg=cfg, ops=ops), _end(params), x_PtD)


def summed_loss(params: dict, x_PtD: torch.Tensor, labels_Pt: torch.Tensor, weights_Pt: torch.Tensor, cfg: ModelConfig,
                ops: Ops) -> torch.Tensor:
    """The sum of weight * nll over the tokens here: one scalar, whose gradients are made in the forward pass."""
    return ops.use(partial(_summed_loss, cfg=cfg), _end(params), x_PtD, labels_Pt, weights_Pt)


def token_nll(params: dict, x_PtD: torch.Tensor, labels_Pt: torch.Tensor, cfg: ModelConfig, ops: Ops) -> torch.Tensor:
    """-log p(label) of every token here, [P, t]."""
    return ops.use(partial(_token_nll, cfg=cfg), _end(params), x_PtD, labels_Pt)


class End(Protocol):
    """One of the functions that `ends` makes."""
    def __call__(self, params: dict, batch: Batch, cfg: ModelConfig, ops: Ops = LOCAL) -> torch.Tensor: ...


def ends(last: Callable[..., torch.Tensor]) -> tuple[End, End, End, End]:
    """A family's (hidden, forward, loss, token_losses) of its `last(params, batch, cfg, ops)`, [P, t, D]."""

    def hidden(params: dict, batch: Batch, cfg: ModelConfig, ops: Ops = LOCAL) -> torch.Tensor:
        """Hidden states after the final norm, [P, t, D]."""
        return final_norm(params, last(params, batch, cfg, ops), cfg, ops)

    def forward(params: dict, batch: Batch, cfg: ModelConfig, ops: Ops = LOCAL) -> torch.Tensor:
        """Logits, [P, t, V]."""
        return logits(params, last(params, batch, cfg, ops), cfg, ops)

    def loss(params: dict, batch: Batch, cfg: ModelConfig, ops: Ops = LOCAL) -> torch.Tensor:
        """This rank's sum of loss_mask * nll, a scalar; logits exist by chunks, and the head's gradients in forward."""
        return summed_loss(params, last(params, batch, cfg, ops), batch.labels, batch.loss_mask, cfg, ops)

    def token_losses(params: dict, batch: Batch, cfg: ModelConfig, ops: Ops = LOCAL) -> torch.Tensor:
        """-log p(label) of every token, [P, t]; logits exist a chunk at a time, and once more in backward."""
        return token_nll(params, last(params, batch, cfg, ops), batch.labels, cfg, ops)

    return hidden, forward, loss, token_losses


def _end(params: dict) -> dict:
    return {"norm": params["norm"], "head": params["head"] if "head" in params else params["embed"]}


def _normed(node: dict, x_PtD: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    return norm(x_PtD, node, cfg)


def _logits(p: dict, x_PtD: torch.Tensor, cfg: ModelConfig, ops: Ops) -> torch.Tensor:
    return ops.linear(norm(x_PtD, p["norm"], cfg), p["head"], ("embed", "vocab"))


def _summed_loss(p: dict, x_PtD: torch.Tensor, labels_Pt: torch.Tensor, weights_Pt: torch.Tensor,
                 cfg: ModelConfig) -> torch.Tensor:
    x_PtD = norm(x_PtD, p["norm"], cfg)
    return linear_cross_entropy(x_PtD.flatten(0, 1), p["head"]["weight"], labels_Pt.flatten(), weights_Pt.flatten())


def _token_nll(p: dict, x_PtD: torch.Tensor, labels_Pt: torch.Tensor, cfg: ModelConfig) -> torch.Tensor:
    x_PtD = norm(x_PtD, p["norm"], cfg)
    return -token_logprobs(x_PtD.flatten(0, 1), p["head"]["weight"], labels_Pt.flatten()).view(labels_Pt.shape)


# ---- descriptions ----------------------------------------------------------------------------------------------------

def product(num_out: int, num_in: int, axes: tuple[str, str], cfg: ModelConfig, dtype: torch.dtype, bias: bool = False,
            num_experts: int = 0) -> dict:
    """The node of a product with a [num_out, num_in] weight, `num_experts` of them stacked; `axes` = (out, in) names.

    >>> cfg = msgspec.defstruct("Config", ["initializer_range"])(0.02)
    >>> sorted(product(8, 4, ("mlp", "embed"), cfg, torch.float32, bias=True))
    ['bias', 'weight']
    >>> product(8, 4, ("mlp", "embed"), cfg, torch.float32, num_experts=2)["weight"].axes
    ('expert', 'mlp', 'embed')
    """
    (stack, expert) = ((num_experts,), ("expert",)) if num_experts else ((), ())
    weight = {"weight": Param((*stack, num_out, num_in), dtype, (*expert, *axes), Normal(cfg.initializer_range))}
    return weight | {"bias": Param((*stack, num_out), dtype, (*expert, axes[0]), ZEROS)} if bias else weight


def scale(size: int, axis: str, dtype: torch.dtype) -> dict:
    """The node of an RMSNorm."""
    return {"weight": Param((size,), dtype, (axis,), ONES)}


def hf_names(table: Sequence[tuple[str, str]], specs: tree.Tree) -> dict[str, str]:
    """Expand a name table over a spec tree: every leaf's path to its Hugging Face name.

    Rows map a node's path to a module's name, with `{i}` for the layer in both; a node's members (weight, bias) keep
    their names. A row for a leaf's path gives its whole name. `{e}` in a name stays: one tensor an expert, stacked.
    Raises KeyError if the tree has a node that the table lacks.

    >>> table = (("layers.{i}.q", "model.layers.{i}.self_attn.q_proj"),)
    >>> for path, name in hf_names(table, {"layers": [{"q": {"weight": 0, "bias": 0}}]}).items():
    ...     print(path, name)
    layers.0.q.weight model.layers.0.self_attn.q_proj.weight
    layers.0.q.bias model.layers.0.self_attn.q_proj.bias
    """
    to_hf, names = dict(table), {}
    for path, _ in tree.flatten_with_path(specs):
        layer = next((part for part in path.split(".") if part.isdigit()), "")
        leaf = ".".join("{i}" if part.isdigit() else part for part in path.split("."))
        node, _, member = leaf.rpartition(".")
        if leaf not in to_hf and node not in to_hf:
            raise KeyError(f"hf_names: no row for `{node}` (leaf {path}); add it to the family's table")
        name = to_hf[leaf] if leaf in to_hf else f"{to_hf[node]}.{member}"
        names[path] = type(name)(name.replace("{i}", layer))                 # a row may be an `xtf.hf.Transposed`
    return names


def flops(specs: tree.Tree, cfg: ModelConfig, windows: Sequence[int | None], lengths: Sequence[int],
          step: tree.Tree | None = None) -> float:
    """FLOPs of documents of these lengths: of a forward pass, or with `step`, the specs of a step (the model's as its
    transforms left them, which say what is trained and adapted), of forward and of the gradients that are made.

    Forward: 2 × (weights that multiply, head, router and adapters included, of experts the top_k that a token chooses,
    embedding lookup not) × tokens + Σ over layers of 4 × H × d × pairs, where pairs counts the keys that each query
    sees: l (l + 1) / 2 in a document of l tokens, w (w + 1) / 2 + (l - w) w under a window w < l. Backward: for each
    product once more where its input needs a gradient, and once where its weight is trained (`xtf.flops`); twice
    attention's where anything before it is trained. Of a step that trains everything that is 3 × forward.
    """
    whole, tokens = specs if step is None else step, sum(lengths)
    router: moe.Router | None = getattr(cfg, "router", None)
    total, needs = 0.0, count.trained(whole["embed"])
    for p, window in zip(whole["layers"], windows, strict=True):
        work = count.layer(p, needs, tokens, 0 if router is None else router.top_k)
        scores = 4 * cfg.num_attention_heads * cfg.head_dim * sum(count.pairs(length, window) for length in lengths)
        total += work.forward + scores + (0 if step is None else work.backward + 2 * scores * work.attention)
        needs = work.needs
    needs = needs or count.trained(whole["norm"])
    head = count.product(whole["head"] if "head" in whole else whole["embed"], needs, tokens)
    return total + head.forward + (0 if step is None else head.backward)
