"""benchmarks/interrupted.py at toy size: pre-training killed twice, moved from 1 to 4 to 2 ranks."""
from benchmarks import interrupted


def test_the_interrupted_curve_lies_on_the_other(tmp_path):
    result = interrupted.main([str(tmp_path), "--tiny", "--steps", "40", "--threads", "1"])
    assert result["loss"] < 1e-5 and result["eval_loss"] < 1e-5 and result["weights"] < 1e-4
    assert result["last"] < 0.9 * result["first"]
