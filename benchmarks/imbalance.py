"""Experts on two ranks, from an even routing to every token on one rank: time and memory beside the bound of
docs/experts.md.

    python benchmarks/imbalance.py [--tokens 1024] [--rounds 7]

One layer of a Qwen3-MoE (hidden 512, 16 experts of 512, top-4), forward and backward, fp32, one thread a rank, routes
replayed; rounds are interleaved, medians of the slower rank. Memory is what forward keeps for backward on the fuller
rank.
"""
import argparse
import statistics
import time

import torch

import xtf
from xtf import device
from xtf.data import Batch
from xtf.data.batch import cut
from xtf.models import qwen3_moe as model
from xtf.parallel import ep
from xtf.testing import pool

E, K = 16, 4
CONFIG = model.config({"vocab_size": 64, "hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
                       "num_key_value_heads": 4, "head_dim": 16, "num_experts": E, "num_experts_per_tok": K,
                       "moe_intermediate_size": 512})


def routes(lopsided: float, tokens: int) -> torch.Tensor:
    """[1, T, K]: the part `lopsided` of the tokens go to the first rank's experts alone, the rest to two of either
    rank's."""
    t = torch.arange(tokens)
    even = torch.stack([t % 8, (t + 1) % 8, 8 + t % 8, 8 + (t + 1) % 8], -1)
    one = torch.stack([(t + k) % 8 for k in range(K)], -1)
    return torch.where((t < lopsided * tokens)[:, None], one, even)[None]


def measure(tokens: int, rounds: int) -> dict[float, tuple[float, int, float]]:
    """On a rank: for each part that is lopsided, (median seconds, bytes kept, loss)."""
    from xtf.testing.laws import shared_mesh  # it does not travel to a rank with this script's functions
    torch.set_num_threads(1)
    ids = torch.randint(64, (2, tokens), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids.roll(-1, 1), torch.ones(2, tokens), torch.arange(tokens).expand(2, -1) % 64,
                  torch.tensor([list(range(0, tokens + 1, 64))] * 2, dtype=torch.int32))
    m = shared_mesh((("ep", 2),))
    kept: dict[int, int] = {}

    def share(params, batch, ops, part):
        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return model.loss_and_routing(params, batch, CONFIG, ops,
                                          [routes(part, tokens)])[0] / batch.loss_mask.numel()

    def run_of(part):
        grad = xtf.value_and_grad(lambda p, b, ops: share(p, b, ops, part))
        return xtf.shard(lambda p, b, ops: grad(p, b, ops)[0], ep("ep"), mesh=m, specs=model.specs(CONFIG))

    runs = {part: run_of(part) for part in (0.0, 0.5, 1.0)}
    params, mine = xtf.init(runs[0.0].specs, 0, runs[0.0].layout), cut(batch, m)
    times, out = {part: [] for part in runs}, {}
    for _ in range(rounds + 1):
        for part, run in runs.items():
            kept.clear()
            torch.distributed.barrier()
            start = time.perf_counter()
            loss = run(params, mine)
            times[part].append(time.perf_counter() - start)
            out[part] = sum(kept.values()), loss.item()
    return {part: (statistics.median(times[part][1:]), *out[part]) for part in runs}


def main(argv: list[str] | None = None) -> dict[float, tuple[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    ranks = pool(2).run(measure, args.tokens, args.rounds)
    print(device.capability())
    result, even = {}, [max(rank[0.0][i] for rank in ranks) for i in range(2)]
    for part in ranks[0]:
        slowest, fullest = (max(rank[part][i] for rank in ranks) for i in range(2))
        result[part] = slowest / even[0], fullest / even[1]
        print(f"{part:.0%} of the tokens on one rank: the fuller rank computes {1 + part:.1f} times the rows; "
              f"{slowest * 1e3:.0f} ms ({result[part][0]:.2f} of even), {fullest / 1e6:.0f} MB kept "
              f"({result[part][1]:.2f}), loss {ranks[0][part][2]:.6f}")
    return result


if __name__ == "__main__":
    main()
