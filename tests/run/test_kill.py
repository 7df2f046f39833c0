"""kill -9 of a random rank at random moments, saves among them: the run that goes on is the run that was never
killed."""
import pytest
import torch

from tests.run import kills

MESHES = ["", "dp=2", "dp=2,sp=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, by mesh and dtype."""
    made = {}

    def get(mesh, dtype):
        if (mesh, dtype) not in made:
            out = tmp_path_factory.mktemp("whole")
            assert kills.run(out, [mesh], dtype, 0, 0) == 0
            made[mesh, dtype] = kills.curve(out), kills.final(out)
        return made[mesh, dtype]
    return get


def same_layout(whole, out, mesh, kills_wanted, seed):
    made = kills.run(out, [mesh], torch.float32, kills_wanted, seed)
    (steps, losses), params = whole(mesh, torch.float32)
    assert kills.curve(out) == (steps, losses) and steps == list(range(1, kills.STEPS + 1))
    assert all(torch.equal(kills.final(out)[k], params[k]) for k in params)
    return made


def other_layouts(whole, out, meshes, dtype, kills_wanted, seed):
    made = kills.run(out, meshes, dtype, kills_wanted, seed)
    (steps, losses), params = whole(meshes[0], dtype)
    got_steps, got = kills.curve(out)
    loss_bound, weight_bound = (1e-6, 1e-4) if dtype == torch.float32 else (1e-10, 1e-10)
    assert got_steps == steps and max(abs(a / b - 1) for a, b in zip(got, losses, strict=True)) < loss_bound
    assert kills.deviation(kills.final(out), params) < weight_bound
    return made


@pytest.mark.parametrize("mesh", ["", pytest.param("dp=2", marks=pytest.mark.slow), "dp=2,sp=2"])
def test_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(whole, tmp_path, mesh):
    assert same_layout(whole, tmp_path / "out", mesh, 2, seed=len(mesh))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
def test_killed_and_resumed_on_other_layouts(whole, tmp_path, dtype):
    assert other_layouts(whole, tmp_path / "out", ["dp=4", "dp=2", ""], dtype, 2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_hundred_kills(whole, tmp_path):
    made = 0
    for seed in range(1000):
        if made >= 100:
            break
        out = tmp_path / str(seed)
        if seed % 2:
            dtype = torch.float32 if seed % 4 == 1 else torch.float64
            made += other_layouts(whole, out, [["", "dp=2", "dp=4"], ["dp=4", "", "sp=2"],
                                               ["dp=2", "dp=2,sp=2", ""]][seed % 3], dtype, 8, seed)
        else:
            made += same_layout(whole, out, MESHES[seed // 2 % 3], 8, seed)
        print(f"seed {seed}: {made} kills", flush=True)
    assert made >= 100
