"""benchmarks/interrupted.py at toy size: pre-training that is killed and moved to other ranks."""
import pytest

from benchmarks import interrupted


@pytest.mark.parametrize("steps, moves, falls_to", [
    (20, ["--move", "dp=2", "0.5", "--move", "", "1"], 0.95),
    pytest.param(40, [], 0.9, marks=pytest.mark.slow),                 # twice, from 1 to 4 to 2 ranks
], ids=["2-1", "1-4-2"])
def test_the_interrupted_curve_lies_on_the_other(tmp_path, steps, moves, falls_to):
    """The launcher of two ranks is killed -9, one process goes on."""
    result = interrupted.main([str(tmp_path), "--tiny", "--steps", str(steps), "--threads", "1", *moves])
    assert result["loss"] < 1e-5 and result["eval_loss"] < 1e-5 and result["weights"] < 1e-4
    assert result["last"] < falls_to * result["first"]                 # it learns, so there is a curve to lie on


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_killed_and_moved(tmp_path, family):
    """200 steps on real text on dp=2,ep=2, killed half way and moved to ep=4: the curve of one process.

    In float64: in float32 a rounding now and then sends a token to another expert, and from there on two right runs
    part.
    """
    result = interrupted.main([str(tmp_path), "--family", family, "--steps", "200", "--threads", "1", "--dtype",
                               "fp64"])
    assert result["loss"] < 1e-8 and result["eval_loss"] < 1e-8
    assert result["last"] < 0.9 * result["first"]
