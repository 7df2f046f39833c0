"""A run that is killed -9 again and again, on real ranks: the harness of test_kill.py.

The model and the step are tests/outsider.py's; locking, data, checkpoints, log and resumption are those of every
recipe.
"""
import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import xtf
from tests import outsider
from xtf import cli, tree
from xtf.data import Loader, Sample
from xtf.parallel import fsdp, ulysses
from xtf.run import Run
from xtf.testing import Pool
from xtf.transforms import jit

STEPS, SEQ_LEN, PACKS = 30, 16, 4
MODEL = SimpleNamespace(flops=lambda cfg, lengths, specs: float(sum(lengths)), names=lambda cfg: {},
                        specs=lambda cfg: {})


def specs(dtype):
    """tests/outsider.py's, the keys' biases frozen: no loss depends on them, so that Adam would turn rounding into
    steps of full size."""
    return tree.map_with_path(lambda path, p: replace(p, trainable=not path.endswith("k.bias")), outsider.specs(dtype))


def samples():
    draw = np.random.default_rng(5)
    return [Sample(ids, np.ones(len(ids), bool))
            for ids in (draw.integers(0, outsider.V, draw.integers(3, SEQ_LEN + 1)) for _ in range(30))]


def flags(out, mesh="", **more):
    return cli.Flags(model="", data=(), out=str(out), steps=STEPS, seq_len=SEQ_LEN, batch_tokens=PACKS * SEQ_LEN,
                     mesh=mesh, save_every=3, keep=2, resume="auto", threads=1, hang_timeout=60.0, **more)


def train(out, mesh, dtype, pause=0.0):
    """On every rank: the whole run, from its newest checkpoint; rank 0 leaves the final parameters in OUT/final.pt."""
    with Run(flags(out, mesh)) as run:
        if run.finished:
            return
        step = xtf.shard(outsider.step, fsdp("dp", "ep", "sp"), ulysses("sp"), jit(compile=False, donate=True),
                         mesh=run.mesh, specs=specs(dtype))
        params = xtf.init(step.specs, 3, step.layout)
        state = run.begin(xtf.TrainState.create(params, outsider.opt.init(params)),
                          Loader(samples(), SEQ_LEN, PACKS, seed=1), MODEL, None)
        for i, batch in run.steps():
            state, metrics = step(state, replace(batch, loss_mask=batch.loss_mask.to(dtype)))
            run.log(i, metrics)
            run.save(i, state)
            time.sleep(pause)                                           # so that kills also fall between saves
        run._checkpoints.wait()
        final = {path: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
                 for path, p in tree.flatten_with_path(state.params)}
        if run.mesh is None or run.mesh.get_rank() == 0:
            torch.save(final, Path(out) / "final.new")
            os.replace(Path(out) / "final.new", Path(out) / "final.pt")


def ranks(mesh):
    return int(np.prod([int(part.partition("=")[2]) for part in mesh.split(",") if part] or [1]))


def logged(out):
    file = Path(out) / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(pid, out, row, delay, over):
    """SIGKILL, `delay` seconds after so many steps are logged: a moment of the run however fast the machine is."""
    while logged(out) < row:
        if over.wait(0.002):
            return
    if not over.wait(delay):
        os.kill(pid, signal.SIGKILL)


def run(out, meshes, dtype, kills, seed):
    """Train to the end, killed `kills` times on the way; each start takes the next of `meshes`, the last one ever
    after. Returns the kills made."""
    draw, made, starts = random.Random(seed), 0, 0
    (out := Path(out)).mkdir(parents=True, exist_ok=True)
    while not (out / "final.pt").exists():
        mesh = meshes[min(starts, len(meshes) - 1)]
        starts += 1
        workers = Pool(ranks(mesh))
        workers.run(len, ())                                            # up, before the clock runs
        victim = draw.choice(workers.workers)[1]
        over = threading.Event()
        # a row that is there already: killed while it starts
        killer = threading.Thread(target=kill, args=(victim.pid, out, draw.randrange(STEPS * 3 // 4),
                                                     draw.uniform(0.0, 0.05), over))
        if made < kills:
            killer.start()
        try:
            workers.run(train, str(out), mesh, dtype, 0.01)
        except RuntimeError:
            made += 1  # a rank died, the others said so, and the pool ended them
            if killer.is_alive():
                raise
        finally:
            over.set()
            workers.close()
        assert starts < 20 + 3 * kills, "no progress"
    return made


def curve(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [r["step"] for r in rows], [r["loss"] for r in rows]


def final(out):
    return torch.load(Path(out) / "final.pt")


def deviation(a, b):
    """The largest difference of any leaf, relative to that leaf's largest value."""
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max()).item() for k in b)
