"""Checkpoints of one process: what is kept, what damage does, and what is left when a process is killed."""
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xtf
from xtf import checkpoint, tree
from xtf.checkpoint import Checkpoints, restore_params
from xtf.checkpoint import checkpoints as checkpoints_file
from xtf.checkpoint import tensorstore as arrays

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool)


def bits(shape, dtype, seed):
    """Any bit pattern: NaNs of every kind, -0.0, denormals."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8,
                        generator=torch.Generator().manual_seed(seed))
    return (raw[..., 0] > 127) if dtype is torch.bool else raw.view(dtype).reshape(shape)


def state_of(seed, rows=300):
    params = {"layers": [{"w": bits((rows, 40), torch.float32, seed).requires_grad_()},
                         {"w": bits((3,), torch.bfloat16, seed + 1)}],
              "empty": torch.zeros(0, 3)}
    state = xtf.TrainState.create(params, opt=({"mu": {"layers": [None, bits((3,), torch.float32, seed)]}}, (), None),
                                  extra={}, seed=seed)
    return tree.tree_map(lambda x: x,
                         xtf.TrainState(state.step, state.params, state.opt, state.extra, state.key, donated=True))


def same(a, b):
    return all(x is None if y is None else torch.equal(raw(x), raw(y)) for x, y in tree.zip_leaves(a, b))


def raw(x):
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def blank(state):
    return tree.tree_map(lambda x: None if x is None else torch.empty_like(x).zero_().requires_grad_(x.requires_grad),
                         state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, state_of(1), {"cursor": {"step": 7, "name": "é", "share": 0.1}})
    return folder


def test_restore_is_in_place_and_whole(saved):
    state = blank(state_of(1))
    memory = [x.data_ptr() for x in tree.leaves(state) if x is not None]
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.latest() == 7
        got, data = checkpoints.restore(state)
    assert data == {"cursor": {"step": 7, "name": "é", "share": 0.1}}
    assert same(got, state_of(1)) and got.donated and got.params["layers"][0]["w"].requires_grad
    assert [x.data_ptr() for x in tree.leaves(got) if x is not None] == memory


def test_params_alone(saved):
    for path in (saved, saved / "7"):
        assert same(restore_params(path, blank(state_of(1).params)), state_of(1).params)
    with pytest.raises(ValueError, match=r"only in the checkpoint: params\.layers\.1\.w"):
        restore_params(saved, {"layers": blank(state_of(1).params)["layers"][:1], "empty": torch.zeros(0, 3)})
    with pytest.raises(FileNotFoundError, match="no checkpoint in it"):
        restore_params(saved.parent, {"w": torch.ones(1)})


@given(leaves=st.lists(st.tuples(st.sampled_from(DTYPES),
                                 st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 64]), max_size=3).map(tuple)),
                       min_size=1, max_size=8), chunk=st.sampled_from([1, 64, 1000, 1 << 24]),
       seed=st.integers(0, 1 << 30))
@settings(max_examples=12)
def test_law_6_on_one_process(tmp_path_factory, leaves, chunk, seed):
    state = {"a": [bits(shape, dtype, seed + i) for i, (dtype, shape) in enumerate(leaves)], "b": (None, {})}
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(arrays, "CHUNK_BYTES", chunk)
        with Checkpoints(tmp_path_factory.mktemp("law"), background=bool(seed % 2)) as checkpoints:
            checkpoints.save(0, state, {})
            assert same(checkpoints.restore(blank(state))[0], state)


def test_what_is_kept(tmp_path):
    loss = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.5, 6: 9.0, 7: 8.0}
    for i in loss:
        # each time anew: retention survives a restart
        with Checkpoints(tmp_path, keep=2, keep_every=4, best="eval_loss") as checkpoints:
            checkpoints.save(i, {"w": torch.tensor(i)}, {}, {"eval_loss": loss[i], "other": -1.0} if i != 5 else None)
    assert checkpoint.steps(tmp_path) == [2, 4, 6, 7]  # best; a multiple of four; the last two
    assert int(restore_params(tmp_path / "2", torch.tensor(0), "w")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "2", "4", "6", "7"]


def test_an_async_save_is_of_what_was(tmp_path, monkeypatch):
    """The step after `save` overwrites everything in place before the first byte is written."""
    go, write = threading.Event(), arrays.write

    async def late(*args):
        assert go.wait(60)
        await write(*args)
    monkeypatch.setattr(arrays, "write", late)
    state = state_of(3)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):                                             # the second one reuses the first one's buffers
            go.clear()
            checkpoints.save(step, state, {"step": step})
            assert checkpoints.steps() == [1][:step - 1]
            with torch.no_grad():
                for x in tree.leaves(state):
                    if x is not None:
                        x.copy_(bits(x.shape, x.dtype, 99 + step))
            go.set()
            checkpoints.wait()
        assert same(checkpoints.restore(blank(state), 1)[0], state_of(3))
        assert not same(checkpoints.restore(blank(state), 2)[0], state_of(3))


@given(data=st.data())
@settings(max_examples=150)
def test_damage_is_never_silent(saved, data):
    """Flip a bit or cut the tail off any file: restore names the checkpoint, or the file did not matter and every bit
    is right."""
    files = sorted(p for p in (saved / "7").rglob("*") if p.is_file())
    file = data.draw(st.sampled_from(files))
    before = file.read_bytes()
    where = data.draw(st.integers(0, max(0, len(before) - 1)))
    after = before[:where] if data.draw(st.booleans()) or not before else \
        before[:where] + bytes([before[where] ^ 1 << data.draw(st.integers(0, 7))]) + before[where + 1:]
    state = blank(state_of(1))
    try:
        file.write_bytes(after)
        with Checkpoints(saved) as checkpoints:
            got, cursor = checkpoints.restore(state)
        assert same(got, state_of(1)) and cursor == {"cursor": {"step": 7, "name": "é", "share": 0.1}}
    except (OSError, ValueError) as e:
        assert str(saved / "7") in str(e)
    finally:
        file.write_bytes(before)


def test_damage_names_the_leaf_or_the_file(saved):
    big = max((saved / "7").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    before = big.read_bytes()
    for after in (before[:1000] + bytes([before[1000] ^ 4]) + before[1001:], before[:len(before) // 2], None):
        try:
            big.unlink() if after is None else big.write_bytes(after)
            told = pytest.raises(OSError, match=r"7/state: the values of params\.layers\.0\.w are damaged or gone")
            with Checkpoints(saved) as checkpoints, told:
                checkpoints.restore(blank(state_of(1)))
        finally:
            big.write_bytes(before)
    cursor = saved / "7" / "data" / "metadata"
    before = cursor.read_bytes()
    try:
        cursor.write_bytes(before.replace(b"0.1", b"0.2"))
        told = pytest.raises(OSError, match=r"7/data/metadata: damaged or gone.*checksum")
        with Checkpoints(saved) as checkpoints, told:
            checkpoints.restore(blank(state_of(1)))
    finally:
        cursor.write_bytes(before)


def test_a_chunk_that_is_gone_is_no_zero(tmp_path):
    import tensorstore as ts
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(5), "b": torch.ones(2)}, {})
        checkpoints.wait()
        store = ts.KvStore.open(arrays._store(tmp_path / "1" / "state"), context=arrays._context()).result()
        assert b"w/c/0" in store.list().result()
        store.write("w/c/0", None).result()
        with pytest.raises(OSError, match="the values of w are damaged or gone"):
            checkpoints.restore({"w": torch.zeros(5), "b": torch.zeros(2)})


def test_another_model_is_named_and_nothing_is_overwritten(saved):
    other = blank(state_of(1, rows=301))
    other.params["layers"][1]["w"] = other.params["layers"][1]["w"].float()
    other.params["new"] = other.params.pop("empty")
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(ValueError) as e:
            checkpoints.restore(other)
        assert not any(x.any() for x in tree.leaves(other) if x is not None)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint 8 in it, only 7"):
            checkpoints.restore(other, 8)
    assert "only here: params.new" in str(e.value) and "only in the checkpoint: params.empty" in str(e.value)
    assert "params.layers.0.w is float32 [300, 40] in the checkpoint, float32 [301, 40] here" in str(e.value)
    assert "params.layers.1.w is bfloat16 [3] in the checkpoint, float32 [3] here" in str(e.value)


@pytest.mark.parametrize("state, words", [
    ({"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}, r"a\.b is the path of two leaves"),
    ({"a/b": torch.ones(1)}, "a/b cannot name an array"), (torch.ones(1), "without a path"),
    ({"a": None}, "no tensors"),
    ({"a": 3.5}, "a is float"), ({"a": torch.ones(2, device="meta")}, "a is a meta tensor"),
    ({"a": torch.eye(2).to_sparse()}, "sparse")])
def test_what_cannot_be_saved_is_named(tmp_path, state, words):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=words):
            checkpoints.save(1, state, {})
        checkpoints.save(1, {"a": torch.ones(1)}, {})                     # and the next one goes well
        checkpoints.wait()
        with pytest.raises(ValueError, match="checkpoint 1 is there, 1 does not come after it"):
            checkpoints.save(1, {"a": torch.ones(1)}, {})


@pytest.mark.parametrize("data", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": torch.ones(1)}])
def test_data_that_json_would_change_is_refused(tmp_path, data):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="data"):
        checkpoints.save(1, {"a": torch.ones(1)}, data)


@pytest.mark.parametrize("background", [True, False])
def test_disk_full(tmp_path, background):
    """The system refuses to write; the error says where, the space is given back, the step before is intact and the
    next one works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"w": torch.randn(100_000)}
    with Checkpoints(tmp_path, background=background) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
        checkpoints.wait()
        for limit in (100_000, 300):  # the arrays do not fit; Orbax's own files do not fit either
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                with pytest.raises(OSError, match=f"{tmp_path}.*") as e:
                    checkpoints.save(2, state, {"step": 2})
                    checkpoints.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert "too large" in str(e.value)
            assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "1"] and checkpoints.steps() == [1]
        got, data = checkpoints.restore({"w": torch.zeros(100_000)})
        assert same(got, state) and data == {"step": 1}
        checkpoints.save(2, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_a_directory_that_cannot_be_written(saved, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    tmp_path.chmod(0o755)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        for parent in tmp_path.parents[:3] if root else ():
            parent.chmod(parent.stat().st_mode | 0o055)                  # nobody may come this far
        if root:
            os.seteuid(65534)                                            # what root may do proves nothing
        with Checkpoints(folder) as checkpoints, pytest.raises(PermissionError, match=str(folder)):
            assert checkpoints.latest() is None
            checkpoints.save(1, {"w": torch.ones(1)}, {})
    finally:
        if root:
            os.seteuid(0)


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_file, "LOCK_SECONDS", 0.2)
    state = {"w": torch.ones(1)}
    with Checkpoints(tmp_path) as first, Checkpoints(tmp_path) as second:
        first.save(1, state, {})
        first.wait()
        assert second.latest() == 1 and same(second.restore({"w": torch.zeros(1)})[0], state)  # reading needs no lock
        with pytest.raises(OSError,
                           match=f"{tmp_path}: another run writes checkpoints here .process {os.getpid()} on "):
            second.save(2, state, {})
        first.close()
        second.save(2, state, {})
        second.wait()
        assert second.steps() == [1, 2]


def test_sweeping_leaves_a_live_run_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(1)}, {})
        checkpoints.wait()
        for name in ("2.orbax-checkpoint-tmp", ".retired"):
            (tmp_path / name / "0").mkdir(parents=True)
        Checkpoints(tmp_path).close()
        assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir() and (tmp_path / ".retired").is_dir()
    Checkpoints(tmp_path).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "1"]


@pytest.mark.parametrize("bad", [{"keep": 0}, {"keep_every": -1}])
def test_flags_out_of_range(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Checkpoints(tmp_path, **bad)


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import xtf.checkpoint.orbax                                                   # JAX once, for all the children
from xtf import tree
from xtf.checkpoint import Checkpoints, steps

folder, moments, delays = {folder!r}, {moments!r}, {delays!r}
state = lambda step: {{"w": torch.full((1000,), float(step)), "b": {{"c": torch.tensor(step)}}}}

def child(work):
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException as e:
            print(type(e).__name__, e, flush=True)
            os._exit(1)
    return pid

def train(moment):
    seen = 0
    # every file that Python opens, makes, renames or removes
    def count(event, args):
        nonlocal seen
        if event in ("os.remove", "os.rmdir") or (event in ("open", "os.mkdir", "os.rename")
                                                  and folder in str(args[0])):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    with Checkpoints(folder, keep=2, keep_every=50, background=False) as checkpoints:
        newest = checkpoints.latest() or 0
        for step in range(newest + 1, newest + 4 if moment else newest + 1000):
            checkpoints.save(step, state(step), {{"step": step}})

def check():
    with Checkpoints(folder) as checkpoints:
        for step in checkpoints.steps():
            got, data = checkpoints.restore(state(0), step)
            assert data == {{"step": step}}, step
            assert all(torch.equal(a, b) for a, b in tree.zip_leaves(got, state(step))), step
        left = [n for n in os.listdir(folder) if not n.isdigit() and n != ".lock"]
        assert not left, left

died, newest = 0, 0
for moment, delay in [(m, None) for m in moments] + [(None, d) for d in delays]:
    pid = child(lambda: train(moment))
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    died += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert os.waitpid(child(check), 0)[1] == 0, (moment, delay)
    now = max(steps(folder), default=0)
    assert now >= newest, (now, newest)                                  # nothing that was there is gone
    newest = now
print(died, newest)
"""


def killed(folder, moments, delays):
    script = KILLED.format(root=str(ROOT), folder=str(folder), moments=moments, delays=delays)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return list(map(int, done.stdout.split()))


def test_killed_at_any_moment(tmp_path):
    """Whatever is listed afterwards is whole, bit for bit; the rest is swept at the next start; no checkpoint is
    lost."""
    rng = random.Random(0)
    died, newest = killed(tmp_path, [rng.randrange(low, low + 16) for low in range(1, 193, 16)],
                          [rng.uniform(0.0, 0.3) for _ in range(3)])
    assert died >= 13 and newest > 6


@pytest.mark.slow
def test_killed_at_every_moment(tmp_path):
    rng = random.Random(1)  # in any order: rising, each would die before it retires a step, and
    # the folder only grow
    died, newest = killed(tmp_path, rng.sample(range(1, 250), 249), [rng.uniform(0.0, 0.5) for _ in range(100)])
    assert died >= 300 and newest > 200


def test_neither_import_nor_restore_imports_jax(saved):
    code = """if True:
        import sys, xtf, xtf.checkpoint, torch
        there = lambda *names: [m for m in names if m in sys.modules]
        print(there("jax", "orbax", "tensorstore", "ml_dtypes"))
        with xtf.checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
            print(checkpoints.steps(), there("jax", "orbax"))
        print(int(xtf.checkpoint.restore_params(sys.argv[1], torch.tensor(0), "key")), there("jax", "orbax"))"""
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=False,
                          cwd=ROOT)
    assert done.stdout.split("\n") == ["[]", "[7] []", "1 []", ""], done.stderr


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    async def slow(*args):
        time.sleep(1.0)
    monkeypatch.setattr(arrays, "write", slow)
    checkpoints = Checkpoints(tmp_path)
    start = time.monotonic()
    checkpoints.save(1, {"w": torch.ones(1000)}, {})
    assert time.monotonic() - start < 0.9
    checkpoints.close()
