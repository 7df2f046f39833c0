"""One thread, one dtype, drawn examples that are the same on every run."""
import pytest
import torch
from hypothesis import HealthCheck, settings

from xtf.testing import _pool

torch.set_num_threads(1)

# What ranks that run a recipe or write a checkpoint (JAX) would import each by themselves: 3 s of a processor.
_pool.PRELOAD += ["transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
                  "transformers.tokenization_utils_tokenizers", "xtf.run", "xtf.cli", "xtf.data",
                  "xtf.checkpoint.orbax", "xtf.checkpoint.tensorstore", "matplotlib.figure"]

slow_data = [HealthCheck.too_slow, HealthCheck.data_too_large]   # examples are training steps: slow by nature
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=slow_data)
settings.register_profile("slow", deadline=None, max_examples=1000, suppress_health_check=slow_data)


def pytest_configure(config):
    settings.load_profile("slow" if config.option.markexpr == "slow" else "default")


@pytest.fixture(autouse=True)
def default_dtype():
    """A test that changes the default dtype changes it for itself."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
