"""A checkpoint directory's logits and gradients on any layout: what parity with others is measured on."""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from xtf import hf, models, tree
from xtf._shard import shard
from xtf.data.batch import Batch, Sample, cut, pack, stack
from xtf.grad import value_and_grad
from xtf.layout import parse_mesh
from xtf.ops import Ops
from xtf.testing._pool import pool
from xtf.testing.laws import Layout, shared_mesh, whole


def logits_and_grads(path: str, sequences: Sequence[Sequence[int]], dtype: torch.dtype,
                     layout: Layout | dict[str, int] | str | None = None
                     ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logits of ragged sequences and gradients of their summed next-token loss, by a Hugging Face directory's model.

    `sequences` are lists of token ids, packed into one batch; parameters have `dtype`. `layout` is None (one process),
    mesh sizes (`{"dp": 2, "sp": 2}` or `"dp=2,sp=2"`: fsdp over dp, ep and sp, experts on ep) or a `Layout`; it runs on
    real ranks of a process pool.

    Returns a list of [len, vocab] logits, and gradients by the name that each tensor has in the directory's files (in
    bf16 directories, where it is quantised), whole, on the CPU.

    Raises ValueError for an empty sequence or a token outside the vocabulary.
    """
    layout = as_layout(layout)
    sequences = [list(s) for s in sequences]
    if not sequences or not all(sequences):
        raise ValueError("logits_and_grads: give at least one sequence, each of at least one token")
    batch, where = _batch(sequences, layout)
    args = str(path), batch, dtype, layout
    results = pool(layout.num_ranks).run(_on_rank, *args) if layout.num_ranks > 1 else [_on_rank(*args)]
    sp = layout.sizes.get("sp", 1)
    # sp is the fastest axis
    rows = [torch.cat([results[r + i][0] for i in range(sp)], 1) for r in range(0, layout.num_ranks, sp)]
    logits = torch.cat(rows)
    grads = results[0][1]
    assert grads is not None
    return [logits[p, at:at + len(s)] for (p, at), s in zip(where, sequences, strict=True)], grads


def as_layout(layout: Layout | dict[str, int] | str | None) -> Layout:
    """A `Layout` from whatever describes one.

    >>> as_layout("dp=2,sp=2").store
    ('dp', 'sp')
    """
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, str):
        layout = parse_mesh(layout)
    sizes = {a: n for a, n in (layout or {}).items() if n > 1}
    order = [a for a in ("replicate", "dp", "ep", "sp") if a in sizes]
    return Layout(tuple((a, sizes[a]) for a in order), tuple(a for a in order if a != "replicate"))


def _batch(sequences: list[list[int]], layout: Layout) -> tuple[Batch, list[tuple[int, int]]]:
    """One pack for each rank that holds other packs, the emptiest filled first; and (pack, start) of each sequence."""
    fill: list[list[int]] = [[] for _ in range(layout.pack_ranks)]
    where = []
    length = lambda p: sum(len(sequences[i]) for i in fill[p])
    for i in range(len(sequences)):
        p = min(range(len(fill)), key=length)
        where.append((p, length(p)))
        fill[p].append(i)
    sp = layout.sizes.get("sp", 1)
    T = -(-max(map(length, range(len(fill)))) // sp) * sp
    packs = [pack([Sample(sequences[i], [1] * len(sequences[i])) for i in members], T,
                  max_documents=max(map(len, fill)) + 1) for members in fill]
    return stack(packs), where


def _on_rank(path: str, batch: Batch, dtype: torch.dtype,
             layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    module, cfg = models.from_hf(path)
    names = module.names(cfg)

    def probe(params: tree.Tree, batch: Batch, ops: Ops) -> Any:
        with torch.no_grad():
            logits = module.forward(params, batch, cfg, ops)
        _, grads = value_and_grad(lambda params, batch, ops: module.loss(params, batch, cfg, ops))(params, batch, ops)
        return logits, grads

    m = shared_mesh(layout.mesh)
    specs = module.specs(cfg, dtype=dtype)
    on_ep = "ep" in layout.sizes and any("expert" in p.axes for p in tree.leaves(specs))
    layout = replace(layout, donate=False, experts=layout.experts or "ep" * on_ep)
    run = shard(probe, *layout.transforms(), mesh=m, specs=specs)
    logits, grads = run(hf.load(path, run.specs, names, run.layout), cut(batch, m))
    grads = {name: x for leaf, g in tree.flatten_with_path(grads) if g is not None
             for name, x in hf.file_tensors(names, leaf, whole(g)).items()}
    return logits.detach().cpu(), grads if m is None or m.get_rank() == 0 else None

