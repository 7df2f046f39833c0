"""Launchers that die, folders that are in use, collectives that hang: on real processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import xtf
from xtf.parallel import collectives
from xtf.parallel._mesh import world
from xtf.parallel.peers import Peers
from xtf.run import process
from xtf.testing import Pool, pool

WAIT = 120.0


def eventually(true, what):
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT} s"
        time.sleep(0.05)


def python(source, *args, **options):
    return subprocess.Popen([sys.executable, "-c", source, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


HOLD = """
import sys, time
from xtf.parallel.peers import Peers
from xtf.run import process
with process.locked(sys.argv[1], Peers(), wait=0.2):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_folder_in_use_is_refused_and_its_owner_named(tmp_path):
    owner = python(HOLD, tmp_path, 60)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=rf"--out .*: in use by process {owner.pid} on .*, since 20"), \
                process.locked(tmp_path, Peers(), wait=0.3):
            pass
        owner.kill()                                                   # -9: nothing was tidied up
        with process.locked(tmp_path, Peers(), wait=WAIT):
            pass
    finally:
        owner.kill()
        owner.communicate()


def test_a_second_start_waits_for_one_that_is_going(tmp_path):
    owner = python(HOLD, tmp_path, 0.5)
    assert owner.stdout.readline() == "held\n"
    with process.locked(tmp_path, Peers(), wait=WAIT):
        assert owner.wait(WAIT) == 0
    owner.communicate()


def in_use(folder):
    import fcntl
    with open(Path(folder) / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def take(folder):
    try:
        with process.locked(folder, Peers(), wait=0.1):
            return "taken"
    except OSError as e:
        return str(e)


def test_all_ranks_hear_that_the_folder_is_in_use(tmp_path):
    with process.locked(tmp_path, Peers()):
        assert in_use(tmp_path)
        said = pool(2).run(take, tmp_path)
    assert said[1] == f"lock: rank 0: {said[0]}" and f"process {os.getpid()}" in said[0]
    assert pool(2).run(take, tmp_path) == ["taken", "taken"] and not in_use(tmp_path)


WORKER = """
import os, sys, time
from pathlib import Path
from xtf.run import process
process.die_with_launcher()
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(600)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_die_with_a_launcher_that_is_killed(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "pids").mkdir()
    launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                                 str(tmp_path / "worker.py"), str(tmp_path / "pids")], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: len([p for p in (tmp_path / "pids").iterdir() if p.read_text()]) == 2, "two workers")
        workers = [int(p.read_text()) for p in (tmp_path / "pids").iterdir()]
        assert all(map(alive, workers))
    finally:
        launcher.kill()
        launcher.wait()
    eventually(lambda: not any(map(alive, workers)), "workers without their launcher")


def hang(folder, culprit, stopped=False):
    m = xtf.mesh(dp=2)
    collectives.sum_(torch.ones(4), world(m))
    dog = process.Watchdog(1.5, folder, every=0.2)
    dog.tick("step 1")
    time.sleep(0.5)
    if m.get_rank() == culprit:
        os.kill(os.getpid(), signal.SIGSTOP) if stopped else time.sleep(60)
    collectives.sum_(torch.ones(8), world(m))


def test_a_hung_collective_is_reported_with_ranks_and_operation(tmp_path):
    workers = Pool(2)
    with pytest.raises(RuntimeError, match="died"):
        workers.run(hang, tmp_path, 1)
    text = (tmp_path / "rank-1.txt").read_text()  # the culprit gives up first, since the other made progress after it
    assert "rank 1 of 2" in text
    assert "done: step 1; last collective: number 1, all_reduce over 2 ranks, 16 bytes from here" in text
    assert "rank 0: done: step 1; collective number 2, all_reduce over 2 ranks, 32 bytes from here, AHEAD" in text
    assert "AHEAD by 1 collectives" in text
    assert "in hang" in text, "where Python stands"


def test_a_stopped_rank_is_named(tmp_path):
    workers = Pool(2)
    with pytest.raises(RuntimeError, match="died"):
        workers.run(hang, tmp_path, 1, True)
    text = (tmp_path / "rank-0.txt").read_text()
    assert "rank 0 of 2" in text and "last collective: number 2, all_reduce over 2 ranks, 32 bytes from here" in text
    assert "rank 1: done: step 1; collective number 1" in text
    assert "SILENT for" in text and "BEHIND by 1 collectives" in text
    assert not (tmp_path / "rank-1.txt").exists()


def test_progress_keeps_the_watchdog_quiet(tmp_path):
    dog = process.Watchdog(0.3, tmp_path, every=0.02)
    for i in range(10):
        time.sleep(0.1)
        dog.tick(f"step {i}")
    dog.close()
    assert json.dumps(dog.beat()) and not list(tmp_path.iterdir())
