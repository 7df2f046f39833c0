"""What xtf.checkpoint relies on in orbax-checkpoint 0.12.8, and what JAX, Orbax and tensorstore find in a checkpoint of
ours."""
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

from xtf import checkpoint, tree
from xtf.checkpoint import Checkpoints, orbax, restore_params, tensorstore
from xtf.checkpoint.checkpoints import RETIRED, TMP

STATE = {"params": {"layers": [{"w": torch.arange(12.0).reshape(3, 4)}, {"w": torch.tensor([1.5, -0.0]).bfloat16()}],
                    "none": None},
         "opt": (torch.tensor(3), ()), "flags": torch.tensor([True, False]),
         "codes": torch.arange(-3, 3, dtype=torch.int8)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(4, STATE, {"cursor": [1, 2]})
    return folder


def without_torch(code, *args):
    """Run code in a process where torch cannot be imported."""
    done = subprocess.run([sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + inspect.cleandoc(code),
                           *map(str, args)],
                          capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_version_is_the_one_that_this_file_describes():
    assert version("orbax-checkpoint") == "0.12.8"


def test_jax_reads_ours(saved):
    out = without_torch("""
        import jax, json
        import orbax.checkpoint as ocp
        with ocp.CheckpointManager(sys.argv[1], item_names=("state", "data")) as manager:
            assert manager.all_steps() == [4] and manager.latest_step() == 4
            items = {"state": ocp.args.PyTreeRestore(), "data": ocp.args.JsonRestore()}
            got = manager.restore(4, args=ocp.args.Composite(**items))
        assert json.loads(got.data["json"]) == {"cursor": [1, 2]}
        state = got.state
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        on_jax = ocp.PyTreeCheckpointer().restore(sys.argv[1] + "/4/state", restore_args=jax.tree.map(
            lambda x: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=one), state))
        for tree in (state, jax.tree.map(lambda x: x.__array__(), on_jax)):
            w, v, step = tree["params"]["layers"][0]["w"], tree["params"]["layers"][1]["w"], tree["opt"][0]
            print(w.dtype, w.tolist(), v.dtype, v.astype("float32").tolist(), int(step), tree["flags"].tolist(),
                  tree["codes"].dtype, tree["codes"].tolist(), tree["params"]["none"], tree["opt"][1])""", saved)
    first, second = out.splitlines()
    assert first == second == ("float32 [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]] bfloat16 "
                               "[1.5, -0.0] 3 [True, False] int8 [-3, -2, -1, 0, 1, 2] None []")


def test_tensorstore_alone_reads_ours(saved):
    out = without_torch("""
        sys.modules["jax"] = sys.modules["orbax"] = None
        import tensorstore as ts
        files = {"driver": "ocdbt", "base": f"file://{sys.argv[1]}/4/state/", "path": "params.layers.0.w"}
        w = ts.open({"driver": "zarr3", "kvstore": files}, open=True, read=True).result()
        print(w.shape, w.read().result().sum())""", saved)
    assert out == "(3, 4) 66.0\n"


def test_orbax_lists_the_steps_that_we_list(saved, tmp_path):
    for name in ("5.orbax-checkpoint-tmp", ".retired/3", "notes"):
        (tmp_path / name).mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 20, 300):
            checkpoints.save(step, STATE, {})
    with ocp.CheckpointManager(tmp_path) as manager:
        assert list(manager.all_steps()) == checkpoint.steps(tmp_path) == [1, 20, 300]


def test_we_read_what_orbax_wrote(tmp_path):
    """Parameters saved by a JAX program, with the options that make zarr3 arrays in OCDBT."""
    params = {"a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": [np.ones(2, np.int32)]}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    with ocp.CheckpointManager(tmp_path, item_handlers={"state": handler}) as manager:
        manager.save(2, args=ocp.args.Composite(state=ocp.args.PyTreeSave({"params": params})))
    got = restore_params(tmp_path, {"a": {"w": torch.zeros(2, 3)}, "b": [torch.zeros(2, dtype=torch.int32)]})
    assert all(np.array_equal(x.numpy(), y) for x, y in tree.zip_leaves(got, params))


class Spy:
    """A manager with our handler whose array writer notes what the file system looks like when it is called."""

    def __init__(self, folder, **options):
        self.folder, self.calls = folder, []

        async def write(where):
            self.calls.append((where, sorted(p.name for p in folder.iterdir())))
        self.manager = ocp.CheckpointManager(
            folder, item_handlers={"state": orbax.handler(write), "data": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options))

    def save(self, step):
        leaf = tensorstore.Leaf
        self.manager.save(step, force=True,
                          args=ocp.args.Composite(state=ocp.args.PyTreeSave({"a": leaf(), "b": [leaf(), None]}),
                                                  data=ocp.args.JsonSave({"x": 1})))


def test_the_writer_is_called_once_in_a_temporary_folder_that_is_there(tmp_path):
    spy = Spy(tmp_path)
    spy.save(3)
    (where, names), = spy.calls
    assert where.is_relative_to(tmp_path / f"3{TMP}") and where.name.startswith("state") and names == [f"3{TMP}"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]
    assert json.loads((tmp_path / "3" / "data" / "metadata").read_text()) == {"x": 1}


def test_an_error_of_the_writer_arrives_as_it_is_and_nothing_gets_a_name(tmp_path):
    class Odd(OSError):
        pass

    async def write(where):
        raise Odd("full")
    manager = ocp.CheckpointManager(tmp_path, item_handlers=orbax.handler(write),
                                    options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False))
    with pytest.raises(Odd):
        manager.save(1, force=True, args=ocp.args.PyTreeSave({"a": tensorstore.Leaf()}))
    assert [p.name for p in tmp_path.iterdir()] == [f"1{TMP}"]


def test_old_steps_leave_by_a_rename_after_the_new_one_has_its_name(tmp_path, monkeypatch):
    spy = Spy(tmp_path, todelete_subdir=RETIRED, preservation_policy=ocp.checkpoint_managers.LatestN(1))
    spy.save(1)
    events = []
    real = os.rename
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, lambda a, b, real=real: (events.append((Path(a), Path(b))), real(a, b))[1])
    spy.save(2)
    here = [(a.relative_to(tmp_path), b.relative_to(tmp_path)) for a, b in events if a.parent == tmp_path]
    assert here == [(Path(f"2{TMP}"), Path("2")), (Path("1"), Path(RETIRED) / "1")]


def test_all_is_synced_before_the_name_and_the_name_before_anything_is_retired(tmp_path, monkeypatch):
    """Each of Python's files is synced after its last write and before the rename; then the directory; then old steps
    go."""
    log = []
    sync, rename = orbax._sync, os.rename
    monkeypatch.setattr(orbax, "_sync", lambda path: (log.append(("sync", Path(path))), sync(path))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(("rename", Path(b))), rename(a, b))[1])
    with Checkpoints(tmp_path, keep=1, background=False) as checkpoints:
        checkpoints.save(1, STATE, {})
        log.clear()
        checkpoints.save(2, STATE, {})
    named = log.index(("rename", tmp_path / "2"))
    synced = {path.relative_to(tmp_path / "2.orbax-checkpoint-tmp") for what, path in log[:named] if what == "sync"
              and "2.orbax" in str(path)}
    needed = {p.relative_to(tmp_path / "2") for p in (tmp_path / "2").rglob("*") if p.name != "commit_success.txt"}
    assert needed <= synced, needed - synced
    assert log[named + 1] == ("sync", tmp_path)


def test_names_and_signatures():
    """Public names, and options by name, so that another version fails here first."""
    options = {f.name for f in dataclasses.fields(ocp.CheckpointManagerOptions)}
    assert options >= {"preservation_policy", "best_fn", "best_mode", "enable_async_checkpointing", "todelete_subdir",
                       "temporary_path_class"}
    assert issubclass(orbax.durable(), ocp.path.atomicity.AtomicRenameTemporaryPath)
    policies = ocp.checkpoint_managers
    infos = [type("Info", (), {"step": i, "metrics": m})()
             for i, m in ((1, {"x": 3.0}), (2, {"x": 1.0}), (3, None), (4, {"x": 2.0}))]
    keep = lambda policy: policy.should_preserve(infos, context=None)
    assert keep(policies.LatestN(1)) == [False, False, False, True]
    assert keep(policies.EveryNSteps(2)) == [False, True, False, True]
    best = policies.BestN(get_metric_fn=lambda m: m["x"], reverse=True, n=1, keep_checkpoints_without_metrics=False)
    assert keep(best) == [False, True, False, False]
    assert keep(policies.AnyPreservationPolicy([policies.LatestN(1), best])) == [False, True, False, True]
