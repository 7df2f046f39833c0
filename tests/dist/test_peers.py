"""Agreement between real ranks: who fails or dies is named to all, over any set of ranks."""
import multiprocessing
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from xtf.parallel import _mesh
from xtf.parallel.peers import BACKGROUND, Peers
from xtf.testing import _pool, pool


def raised(fn):
    try:
        return fn()
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def agreements(ranks, culprit):
    """What a rank hears: a value, a failure, a failure of the first, different calls, a value once more."""
    if dist.get_rank() not in ranks:
        return raised(lambda: Peers(ranks))
    peers = Peers(ranks, timeout=60)
    me, first = dist.get_rank(), ranks[0]

    def work(kind):
        with peers.together("work"):
            if me == culprit:
                raise kind("no")

    def fails():
        raise KeyError("no")
    return [peers.tell("it", lambda: {"lead": me, "pair": (1, None)}), raised(lambda: work(FileNotFoundError)),
            raised(lambda: work(KeyError)), raised(lambda: peers.tell("it", fails)),
            raised(lambda: peers.tell("it", lambda: {1})),
            raised(lambda: peers.agree("there" if me == culprit and me != first else "here")),
            peers.agree("last", value=me, tag=BACKGROUND)]


@pytest.mark.parametrize("size, ranks, culprit", [(2, (0, 1), 0), (3, (0, 1, 2), 2), (3, (1, 2), 2),
                                                  (4, (0, 1, 2, 3), 1), (4, (1, 3), 1)])
def test_all_hear_the_same(size, ranks, culprit):
    for rank, heard in enumerate(pool(size).run(agreements, ranks, culprit)):
        if rank not in ranks:
            assert heard == f"ValueError: rank {rank} is no peer of ranks {list(ranks)}"
            continue
        first, own = ranks[0], rank == culprit
        named = lambda who, text: f"rank {who}: {text}"
        value, missing, key, failed, odd, other, last = heard
        assert value == {"lead": first, "pair": [1, None]} and last == first
        assert missing == ("FileNotFoundError: no" if own else f"OSError: work: {named(culprit, 'no')}")
        assert key == ("KeyError: 'no'" if own else f"RuntimeError: work: {named(culprit, repr('no'))}")
        assert failed == ("KeyError: 'no'" if rank == first else f"RuntimeError: it: {named(first, repr('no'))}")
        assert odd.startswith("TypeError: " if rank == first else f"RuntimeError: it: rank {first}: ")
        assert other is None if culprit == first else "did not make the same calls" in other and "'there'" in other


def of_meshes():
    """Meshes of the same ranks share their peers; members of other groups beside find each other."""
    me = dist.get_rank()
    dist.new_group([0, 2])                                               # a group more on some ranks than on others
    flat = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("dp",))
    hsdp = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("replicate", "dp"))
    assert _mesh.peers(flat) is _mesh.peers(hsdp) and _mesh.peers(None).lead
    return [_mesh.peers(m).tell("who leads?", lambda: me) for m in (hsdp["dp"], hsdp["replicate"], flat)]


def test_peers_of_meshes():
    assert pool(4).run(of_meshes) == [[0, 0, 0], [0, 1, 0], [2, 0, 0], [2, 1, 0]]


def dies(rank, size, folder, culprit):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    peers = Peers(timeout=60)
    peers.agree("begin")
    start = time.monotonic()
    heard = []
    for what in ("work", "again"):
        if rank == culprit:
            signal.raise_signal(signal.SIGKILL)
        heard.append(raised(lambda what=what: peers.agree(what)))
    (folder / f"rank{rank}").write_text("\n".join([f"{time.monotonic() - start}", *heard]))
    signal.raise_signal(signal.SIGKILL)


@pytest.mark.parametrize("culprit", [0, 2])
def test_who_dies_is_named_at_once(tmp_path, culprit):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_pool.PRELOAD)
    ranks = [context.Process(target=dies, args=(rank, 3, tmp_path, culprit)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
    for rank in {0, 1, 2} - {culprit}:
        seconds, first, _ = (tmp_path / f"rank{rank}").read_text().split("\n")
        assert first.startswith(f"ConnectionError: work: rank {culprit}: is gone") and float(seconds) < 15
