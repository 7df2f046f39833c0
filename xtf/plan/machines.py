"""Machines, and a step's time on them by the roofline: each operator's larger time, of its products or its memory."""
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple


class Machine(NamedTuple):
    """One device of a cluster, by datasheet.

    flops: dense bf16 products a second. memory: bytes. bandwidth: bytes a second of that memory.
    node: devices that share fast links. fast, slow: bytes a second that a device sends within its node, and out of it.
    """
    flops: float
    memory: float
    bandwidth: float
    node: int
    fast: float
    slow: float


# Makers' datasheets, without sparsity; links in one direction; out of a node 400 Gb/s a device (8 ConnectX-7 in a
# node), half of that for an A100 (8 ConnectX-6). a100: SXM, 80 GB. mi300x: seven Infinity Fabric links of 64 GB/s, to
# each other device of a node one. a3: one die of an Ascend 910C, which is what torch sees as a device; the links of a
# supernode of 384 (arXiv 2506.12708, section 3).
MACHINES = {
    "a100": Machine(312e12, 80e9, 2.039e12, 8, 300e9, 25e9),
    "h100": Machine(989e12, 80e9, 3.35e12, 8, 450e9, 50e9),
    "h800": Machine(989e12, 80e9, 3.35e12, 8, 200e9, 50e9),
    "h200": Machine(989e12, 141e9, 4.8e12, 8, 450e9, 50e9),
    "b200": Machine(2250e12, 180e9, 7.7e12, 8, 900e9, 50e9),
    "mi300x": Machine(1307e12, 192e9, 5.3e12, 8, 448e9, 50e9),
    "a3": Machine(376e12, 64e9, 1.6e12, 768, 196e9, 25e9),
}

# The part of a datasheet figure that programs reach. One table for all machines and models; none is fitted to a row
# that we predict.
EFFICIENCY = {
    "products": 0.7,         # large bf16 products with weights
    "experts": 0.5,          # grouped products, hundreds of rows an expert
    "attention": 0.35,       # FlashAttention-2 on an H100 (arXiv 2407.08608, abstract), which torch's varlen_attn is
    "memory": 0.8,           # elementwise passes, of the memory's bandwidth
    "links": 0.8,            # collectives, of the links' bandwidth
    "capacity": 0.92,        # of the memory: the rest is the context, collectives' own buffers and fragments
}
# What torch.compile leaves of the bytes that passes between products move: chains of about two are fused on average.
FUSED = 0.5


class Times(NamedTuple):
    """Seconds of a step by what they are spent on; `hidden` gathers and reductions run under the compute."""
    products: float
    experts: float
    attention: float
    passes: float
    optimizer: float
    exposed: float
    hidden: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        compute = self.products + self.experts + self.attention + self.passes
        return max(compute, self.hidden) + self.exposed + self.optimizer


def roofline(machine: Machine, work: Counter, messages: list[tuple[str, int, int, int]],
             compiled: bool = True, overlapped: Collection[str] = ()) -> Times:
    """How long a `Ledger`'s work takes, and its messages (kind, ranks, of them in this node, bytes sent from here).

    An operator takes max(FLOPs / (peak × efficiency), bytes / (bandwidth × efficiency)). A message takes the longer of
    its parts inside and out of the node: of W ranks, n of them here, (W - n) / (W - 1) of the bytes leave the node,
    through all n devices' links where all ranks get the same (gathers, reductions), through its own where they do not
    (all-to-all). Gathers and reduce-scatters of fsdp, and kinds that are `overlapped`, are hidden under compute, the
    rest is exposed. Latency and the host's time are left out.

    >>> work = Counter({("products", 10**15, 10**9): 1})
    >>> round(roofline(MACHINES["h100"], work, []).products, 2)
    1.44
    """
    seconds = dict.fromkeys(("products", "experts", "attention", "passes", "optimizer"), 0.0)
    for (kind, flops, nbytes), count in work.items():
        moved = nbytes * (FUSED if kind == "passes" and compiled else 1)
        compute = flops / (machine.flops * EFFICIENCY[kind]) if flops else 0.0
        seconds[kind] += count * max(compute, moved / (machine.bandwidth * EFFICIENCY["memory"]))
    hidden = exposed = 0.0
    for kind, ranks, near, nbytes in messages:
        out = nbytes * (ranks - near) / max(ranks - 1, 1)
        ways = 1 if kind == "all_to_all" else near
        took = max((nbytes - out if kind == "all_to_all" else nbytes) / machine.fast,
                   out / ways / machine.slow) / EFFICIENCY["links"]
        if kind in ("all_gather", "reduce_scatter", *overlapped):
            hidden += took
        else:
            exposed += took
    return Times(**seconds, exposed=exposed, hidden=hidden)
