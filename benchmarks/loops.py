"""What is compared: a training step of ours, as the recipes write it, and of transformers, as its users write it.

Both start from one set of weights and read the same packed tokens. A step is a function of a batch that returns the
loss, a number.
"""
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import xtf
from xtf import device, spec, tree
from xtf.data.batch import Batch, Sample, pack_rows, room
from xtf.models import qwen3, qwen3_moe
from xtf.optim import adamw, chain, clip_by_global_norm
from xtf.parallel import fsdp
from xtf.transforms import bf16, jit, remat

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

Step = Callable[[Batch], float]
LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1
FLOPS = ("6 × matmul weights (head included, lookup not; of experts those chosen) × tokens "
         "+ 12 × heads × head_dim × layers × (query, key) pairs that see each other")
LOSS_CHUNK = 256                # tokens of a chunk of transformers' chunked loss


class Shape(NamedTuple):
    """A Qwen3's sizes."""
    family = qwen3
    hidden: int = 512
    intermediate: int = 1536
    layers: int = 12
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 24576
    tied: bool = True

    def config(self) -> dict:
        """As config.json has it."""
        return {"vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "tie_word_embeddings": self.tied}


class Mixture(NamedTuple):
    """A Qwen3-MoE's sizes."""
    family = qwen3_moe
    hidden: int = 512
    width: int = 256
    experts: int = 32
    top_k: int = 4
    layers: int = 3
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 24576
    tied: bool = True

    def config(self) -> dict:
        """As config.json has it."""
        return {"vocab_size": self.vocab, "hidden_size": self.hidden, "moe_intermediate_size": self.width,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "tie_word_embeddings": self.tied,
                "num_experts": self.experts, "num_experts_per_tok": self.top_k, "norm_topk_prob": True}


Sizes = Shape | Mixture
TINY = Shape(hidden=32, intermediate=48, layers=1, heads=2, kv_heads=1, head_dim=16, vocab=64)
TINY_MIXTURE = Mixture(hidden=32, width=16, experts=8, top_k=2, layers=2, heads=2, kv_heads=1, head_dim=16, vocab=64)


class Case(NamedTuple):
    """One way to train. `dtype`: fp32, masters (fp32 weights, bf16 products) or bf16 (weights too; our moments stay
    fp32).

    For transformers alone. `layout`: flat (all packs end to end in one row), rows (a row for each pack), packs (a row
    at a time, gradients accumulated). `attention`: sdpa (block-diagonal mask made from position_ids), documents (a
    causal call of sdpa for each, no mask), varlen (flash attention over varying lengths, CUDA). `loss`: full (all
    logits at once), chunked (chunks, checkpointed). `compile`: none, layers, model.
    `experts`: its experts_implementation. For ours alone, `routes`: even (the experts in turns), few (all tokens to the
    same top_k experts), one (all to one expert, top_k times), or what the router chooses.
    `remat`: blocks are computed again in backward. `liger`: transformers' model with Liger's kernels in it.
    """
    who: str = "xtf"
    dtype: str = "fp32"
    layout: str = "packs"
    attention: str = ""
    loss: str = ""
    compile: str = "none"
    keep_pages: bool = False
    experts: str = ""
    routes: str = ""
    remat: bool = False
    liger: bool = False

    @property
    def name(self) -> str:
        how = [f"compile {self.compile}"] * (self.compile != "none") + ["our allocator setting"] * self.keep_pages
        how = ["remat"] * self.remat + ["Liger"] * self.liger + how
        if self.who == "xtf":
            return ", ".join(["xtf", *[f"routes {self.routes}"] * bool(self.routes), *how])
        return ", ".join([self.who, self.layout, self.attention, f"{self.loss} loss",
                          *[f"{self.experts} experts"] * bool(self.experts), *how])

    @property
    def weights(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


def ragged(shape: Sizes, packs: int, seq_len: int, seed: int, whole: bool = False, trained: float = 1.0) -> Batch:
    """Full packs of random tokens in documents of ragged lengths (log-normal, a third of the pack in the median), or
    one a pack if `whole`.

    The loss is on the last `trained` part of each document, as it is on the answers of chats.
    """
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(packs):
        lengths = [seq_len] if whole else []
        while sum(lengths) < seq_len:
            drawn = int((torch.randn((), generator=g) * 0.7).exp() * seq_len / 3)
            lengths.append(min(max(drawn, 8), seq_len - sum(lengths)))
        rows.append([Sample(torch.randint(shape.vocab, (n,), generator=g), torch.arange(n) >= n - trained * n)
                     for n in lengths])
    return pack_rows(rows, seq_len, room(max(map(len, rows))))


def lengths(batch: Batch) -> list[int]:
    """Tokens of each document."""
    return [n for n in batch.segments.diff(dim=1).flatten().tolist() if n]


def flops(shape: Sizes, batch: Batch) -> float:
    """Of a training step, by the formula `FLOPS`; nothing that is computed twice counts twice."""
    return 3 * shape.family.flops(shape.family.config(shape.config()), lengths(batch))


def num_params(shape: Sizes) -> int:
    """Stored numbers; the tied head counts once."""
    return spec.num_params(specs(shape))


def specs(shape: Sizes, dtype: torch.dtype = torch.float32) -> tree.Tree:
    return shape.family.specs(shape.family.config(shape.config()), dtype)


def weights(shape: Sizes, case: Case) -> tree.Tree:
    """The same for every case."""
    return weights_of(specs(shape, case.weights))


def weights_of(specs: tree.Tree) -> tree.Tree:
    """Initial values; on an accelerator drawn there, since a CPU's generator takes minutes for billions of them."""
    where = device.device()
    if where.type == "cpu":
        return xtf.init(specs)
    generator = torch.Generator(where).manual_seed(0)

    def leaf(p: spec.Param) -> torch.Tensor:
        if isinstance(p.init, spec.Normal):
            made = torch.empty(p.shape, dtype=p.dtype, device=where)
            return made.normal_(p.init.mean, p.init.std, generator=generator).requires_grad_(p.trainable)
        return p.init(p.shape, torch.Generator()).to(where, p.dtype).requires_grad_(p.trainable)
    return tree.tree_map(leaf, specs)


def make(case: Case, shape: Sizes) -> Step:
    if case.keep_pages or case.who == "xtf":                      # recipes start with it
        device.keep_pages()
    return (ours if case.who == "xtf" else theirs)(case, shape)


def ours(case: Case, shape: Sizes) -> Step:
    cfg = shape.family.config(shape.config())
    tx = chain(clip_by_global_norm(1.0), adamw(LR, *BETAS, weight_decay=WEIGHT_DECAY))

    def train_step(state, batch, ops=xtf.LOCAL):
        num_tokens = batch.loss_tokens(ops)

        def share(params, batch, ops):
            if case.routes:
                return qwen3_moe.loss_and_routing(params, batch, cfg, ops, routes(case, shape, batch))[0] / num_tokens
            return shape.family.loss(params, batch, cfg, ops) / num_tokens
        loss, grads = xtf.microbatch(xtf.value_and_grad(share), len(batch.input_ids))(state.params, batch, ops)
        updates, opt = tx.update(grads, state.opt, state.params, ops)
        return state.apply(updates, opt), {"loss": loss}

    transforms = [jit(compile=case.compile != "none"), fsdp("dp"), *[bf16()] * (case.dtype == "masters"),
                  *[remat()] * case.remat]
    step = xtf.shard(train_step, *transforms, specs=specs(shape, case.weights))
    params = weights(shape, case)
    state = xtf.TrainState.create(params, tx.init(params))
    del params  # the state's alone, so that donation frees what it replaces

    def run(batch: Batch) -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])
    return run


def routes(case: Case, shape: Mixture, batch: Batch) -> list[torch.Tensor]:
    """For each layer the experts of each token, [P, T, top_k], as `Case.routes` says."""
    P, T = batch.input_ids.shape
    place = torch.arange(P * T * shape.top_k).view(P, T, shape.top_k)
    return [{"even": place % shape.experts, "few": place % shape.top_k, "one": place * 0}[case.routes]] * shape.layers


def theirs(case: Case, shape: Sizes) -> Step:
    model = hf_model(case, shape).train()
    if case.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3  # pyright: ignore[reportMissingImports]
        apply_liger_kernel_to_qwen3(model=model)
    if case.remat:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward = torch.compile(model, dynamic=False) if case.compile == "model" else model
    for layer in model.model.layers if case.compile == "layers" else ():
        layer.compile(dynamic=False)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, LR, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    kind = device.device().type

    def run(batch: Batch) -> float:
        total = torch.zeros((), device=batch.input_ids.device)
        num_tokens = batch.loss_mask.sum()
        for inputs, labels in hf_inputs(case, batch):
            with torch.autocast(kind, torch.bfloat16, enabled=case.dtype == "masters"):
                if case.loss == "full":
                    loss = forward(**inputs, labels=labels, num_items_in_batch=num_tokens).loss
                else:
                    loss = chunked_loss(model.model(**inputs).last_hidden_state, model.lm_head.weight,
                                        labels) / num_tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)
    return run


def hf_model(case: Case, shape: Sizes) -> Any:
    """transformers' model with our initial weights."""
    from transformers import AutoConfig, AutoModelForCausalLM
    if case.attention != "sdpa":
        register(case.attention)
    names, how = shape.family.names(shape.family.config(shape.config())), {"experts_implementation":
                                                                           case.experts} if case.experts else {}
    config = AutoConfig.for_model(shape.family.__name__.rpartition(".")[2], **shape.config())
    with torch.device(device.device()):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=case.attention, dtype=case.weights, **how)
    state: dict[str, torch.Tensor] = {}
    for path, p in tree.flatten_with_path(weights(shape, case)):
        name = names[path].replace("{e}.down_proj.weight", "down_proj")  # stacked in memory, gates above ups
        if "{e}" in name:
            name = name.rpartition(".{e}.")[0] + ".gate_up_proj"
        state[name] = torch.cat([state[name], p.detach()], 1) if name in state else p.detach()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    return model


def hf_inputs(case: Case, batch: Batch) -> list[tuple[dict, torch.Tensor]]:
    """(arguments, labels) of each forward. transformers shifts labels itself: the token after one with weight is a
    label."""
    labels = batch.input_ids.masked_fill(F.pad(batch.loss_mask[:, :-1], (1, 0)) == 0, -100)
    parts = [(batch.input_ids, batch.positions, labels, batch)]
    if case.layout == "flat":
        parts = [(*(x.flatten()[None] for x in parts[0][:3]), batch)]
    if case.layout == "packs":
        split = [tree.tree_map(lambda x, i=i: x[i:i + 1], batch) for i in range(len(batch.input_ids))]
        parts = [(b.input_ids, b.positions, labels[i:i + 1], b) for i, b in enumerate(split)]
    out = []
    for ids, positions, answers, b in parts:
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        if case.attention == "documents":
            inputs["documents"] = lengths(b)
        if case.attention == "varlen":                            # as many as there may be, so that shapes stay
            starts = torch.arange(0, ids.numel(), b.input_ids.shape[1], device=ids.device, dtype=torch.int32)[:, None]
            ends = F.pad((b.segments[:, :-1] + starts).flatten(), (0, 1), value=ids.numel())
            inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": b.input_ids.shape[1],
                       "max_length_k": b.input_ids.shape[1]}
        out.append((inputs, answers))
    return out


def chunked_loss(x_PTD: torch.Tensor, weight_VD: torch.Tensor, labels_PT: torch.Tensor) -> torch.Tensor:
    """The sum of nll, logits made by chunk and again in backward."""
    def nll(x, y):
        return F.cross_entropy(F.linear(x, weight_VD).float(), y, ignore_index=-100, reduction="sum")
    x_TD, labels_T = x_PTD.flatten(0, 1), F.pad(labels_PT[:, 1:], (0, 1), value=-100).flatten()
    parts: list[Any] = [checkpoint(nll, x, y, use_reentrant=False)
                        for x, y in zip(x_TD.split(LOSS_CHUNK), labels_T.split(LOSS_CHUNK), strict=True)]
    return torch.stack(parts).sum()


def register(name: str) -> None:
    """Give transformers attention over packed documents that needs no mask, as a user who knows it would."""
    from transformers import AttentionInterface, AttentionMaskInterface
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    AttentionInterface.register(name, {"documents": _documents, "varlen": _varlen}[name])


@torch.compiler.disable  # lengths change with every batch: compiled, each would be compiled anew
def _documents(module, q, k, v, mask, scaling=None, documents=(), **_):
    parts = zip(*(x.split(documents, 2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scaling, enable_gqa=True)
                      for qkv in parts], 2).transpose(1, 2), None


def _varlen(module, q, k, v, mask, *, cu_seq_lens_q, max_length_q, scaling=None, **_):
    assert varlen_attn is not None
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:                                                         # torch 2.11
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    return varlen_attn(q, k, v, *lengths, **options).unsqueeze(0), None  # type: ignore[union-attr]
