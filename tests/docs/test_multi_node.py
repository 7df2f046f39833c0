"""docs/multi-node.md and docs/slurm.sbatch, run here: nodes are processes of this machine, and Slurm is a stand-in that
does what its manual says.

The commands of that page stand between ~~~, since they are not for one machine; each is checked here.
"""
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tyro

from xtf import cli

ROOT = Path(__file__).parents[2]
PAGE, SCRIPT = ROOT / "docs" / "multi-node.md", ROOT / "docs" / "slurm.sbatch"
TORCHRUN, FLAGS = "-m torch.distributed.run".split(), ["--model", "m", "--data", "d", "--out", "a folder", "--resume",
                                                       "auto"]

# A rank: joins the others by what the launcher told it, says so, and ends 0.3 s after SIGUSR1 as a run does.
WORKER = """
import json, os, signal, sys, time
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
import torch, torch.distributed as dist
from xtf import device
rank, world = device.init_process_group()
dist.all_reduce(total := torch.ones(()))
folder = os.environ["SAID"]
say = lambda name, **said: (open(f"{folder}/.{name}", "w").write(json.dumps(said)),
                            os.rename(f"{folder}/.{name}", f"{folder}/{name}"))
say(f"rank{rank}", world=world, total=total.item(), local=int(os.environ["LOCAL_RANK"]), argv=sys.argv[1:])
while not heard:
    time.sleep(0.02)
time.sleep(0.3)
say(f"heard{rank}", signals=heard)
os._exit(138)
"""

# srun: SLURM_NTASKS_PER_NODE tasks on each of SLURM_NNODES nodes, signals passed on to them, the largest exit status
# its own.
SRUN = """
import os, signal, subprocess, sys
nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
assert sys.argv[1] == "--kill-on-bad-exit=1" and os.environ["SRUN_CPUS_PER_TASK"] == "3"
tasks = []
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
for rank in range(nodes * each):
    env = os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % each)}
    tasks.append(subprocess.Popen(sys.argv[2:], env=env))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
if sys.argv[1] == "show":
    assert sys.argv[2:] == ["hostnames", os.environ["SLURM_JOB_NODELIST"]]
    print("127.0.0.1\\nnode-2")
else:
    open(os.environ["SAID"] + "/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


def commands():
    """The lines between ~~~ of the page."""
    return [line for block in re.findall(r"^~~~sh\n(.*?)^~~~$", PAGE.read_text(), re.M | re.S)
            for line in block.splitlines()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, processes, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_every_command_is_for_flags_that_exist():
    seen = set()
    for command in commands():
        words = shlex.split(command)
        at = next(i for i, word in enumerate(words) if word.endswith((".py", ".sbatch")))
        assert (ROOT / words[at]).is_file()
        flags = tyro.cli(cli.Flags, args=words[at + 1:])
        assert flags.mesh == "replicate=2,dp=8" and flags.resume == "auto"
        seen.add(words[0])
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser
            args = get_args_parser().parse_args(words[1:])
            assert (args.nnodes, args.nproc_per_node) == ("2", "8")            # 16 ranks, as the mesh has
    assert seen == {"torchrun", "sbatch"}


def test_two_nodes_by_torchrun_and_a_signal_that_reaches_every_rank(tmp_path):
    """The page's own command for a warned run, with this machine for HOST, two nodes of one rank and our worker for the
    recipe."""
    [command] = [c for c in commands() if "--signals-to-handle" in c]
    words = shlex.split(command)
    at = words.index("recipes/qwen3_sft.py")
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {"SAID": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    port, nodes = free_port(), []
    for node in (0, 1):
        given = {"--node-rank": str(node), "--master-addr": "127.0.0.1", "--master-port": str(port),
                 "--nproc-per-node": "1"}
        launcher = [given.get(before, word) for before, word in pairwise(words[:at])]
        nodes.append(subprocess.Popen([sys.executable, *TORCHRUN, *launcher, str(tmp_path / "worker.py"),
                                       *words[at + 1:]], env=env,
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    try:
        wait_for(lambda: all((tmp_path / f"rank{r}").exists() for r in (0, 1)), nodes)
        for node in nodes:
            node.send_signal(signal.SIGUSR1)
        assert [node.wait(30) for node in nodes] == [1, 1]  # as the page says, whatever the ranks' was
    finally:
        [node.kill() for node in nodes]
    for rank in (0, 1):
        assert read(tmp_path, f"rank{rank}") == {"world": 2, "total": 2.0, "local": 0, "argv": words[at + 1:]}
        assert read(tmp_path, f"heard{rank}") == {"signals": [signal.SIGUSR1]}


@pytest.fixture
def slurm(tmp_path):
    """Start docs/slurm.sbatch as Slurm's node would, with `python` replaced by a worker; returns the process."""
    tools = tmp_path / "bin"
    tools.mkdir()

    def tool(name, text):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    tool("srun", f"#!{sys.executable}\n{SRUN}")
    tool("scontrol", f"#!{sys.executable}\n{SCONTROL}")
    started = []

    def start(worker, nodes=2, each=2, *, job):
        (tmp_path / "worker.py").write_text(worker)
        tool("python", f'#!/bin/bash\nexec {sys.executable} {tmp_path}/worker.py "$@"\n')
        env = {"PATH": f"{tools}:{os.environ['PATH']}", "SAID": str(tmp_path), "PYTHONPATH": str(ROOT),
               "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node-[1-2]",
               "SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(nodes * each),
               "SLURM_NTASKS_PER_NODE": str(each), "SLURM_CPUS_PER_TASK": "3"}
        started.append(subprocess.Popen(["bash", str(SCRIPT), *FLAGS], env=env, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, start_new_session=True))
        return started[0]
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def job_with_a_free_port():
    """The script's port is 20000 + the job's number modulo 10000."""
    for job in range(70_000 + os.getpid() % 5000, 80_000):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", 20000 + job % 10000))
                return job
            except OSError:
                continue
    raise AssertionError("no free port")


def test_slurms_ranks_join_and_a_warning_saves_and_requeues(slurm, tmp_path):
    job = job_with_a_free_port()
    process = slurm(WORKER, job=job)
    wait_for(lambda: all((tmp_path / f"rank{r}").exists() for r in range(4)), [process])
    for rank in range(4):
        argv = ["-m", "xtf.recipes.qwen3_sft", *FLAGS]                          # "a folder" is still one word
        assert read(tmp_path, f"rank{rank}") == {"world": 4, "total": 4.0, "local": rank % 2, "argv": argv}
    process.send_signal(signal.SIGUSR1)                                         # --signal=B: to the script alone
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 138, said
    assert all(read(tmp_path, f"heard{rank}") == {"signals": [signal.SIGUSR1]} for rank in range(4))
    assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"


def until(reaction):
    """A rank that says that it is there and waits for a signal."""
    return f"""
import os, signal
{reaction}
open(os.environ["SAID"] + "/rank0", "w")
while True:
    signal.pause()
"""


@pytest.mark.parametrize("worker,warned,code,requeued", [
    ("raise SystemExit(0)", False, 0, False),
    ("raise SystemExit(3)", False, 3, False),
    (until("signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))"), True, 0, False),
    (until(""), True, 138, True)], ids=["done", "failed: it would again", "done just after the warning", "warned"])
def test_only_a_warned_run_that_is_not_done_is_requeued(slurm, tmp_path, worker, warned, code, requeued):
    process = slurm(worker, 1, 1, job=1)
    if warned:
        wait_for((tmp_path / "rank0").exists, [process])
        process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, (tmp_path / "requeued").exists()) == (code, requeued), said


def test_the_scripts_head_is_what_the_page_says():
    head = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", SCRIPT.read_text(), re.M))
    assert head["signal"] == "B:USR1@300" and "requeue" in head
    assert head["open-mode"] == "append" and "gpus-per-task" not in head
    assert int(head["nodes"]) * int(head["ntasks-per-node"]) == 16 and head["ntasks-per-node"] == head["gpus-per-node"]
