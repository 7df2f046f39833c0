"""xtf: training as pure functions over parameter trees, parallelism as transforms of the training step."""
from xtf.grad import microbatch, value_and_grad
from xtf.ops import LOCAL, Ops
from xtf.parallel.mesh import mesh
from xtf.shard import Env, Transform, shard
from xtf.spec import Param, init
from xtf.state import TrainState

__all__ = ["LOCAL", "Env", "Ops", "Param", "TrainState", "Transform", "init", "mesh", "microbatch", "shard", "value_and_grad"]
