"""xtf: training as pure functions over parameter trees, parallelism as transforms of the training step."""
from xtf._shard import shard
from xtf.grad import microbatch, value_and_grad
from xtf.ops import LOCAL, Ops
from xtf.parallel._mesh import mesh
from xtf.spec import Param, init
from xtf.state import TrainState
from xtf.transform import Env, Stage, Transform

__all__ = ["LOCAL", "Env", "Ops", "Param", "Stage", "TrainState", "Transform", "init", "mesh", "microbatch", "shard",
           "value_and_grad"]
