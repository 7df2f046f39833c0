"""The forward of what runs on CUDA alone, over fake tensors on a device that is not there: torch's own meta functions
check devices, dtypes, strides and arguments, and anything that would wait for a number raises.

They need torch's public CUDA build, whose operators need no GPU until they run (`make test-cuda-fake`): on a CPU build
fake tensors cannot even be sliced. Backward asks autograd for the device's context, so gradients are called by name.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xtf import device, tree
from xtf.data import Sample
from xtf.data.batch import pack_rows
from xtf.kernels import attention, experts
from xtf.optim import adamw, chain, clip_by_global_norm, lion, muon, schedules, sgd

pytestmark = [pytest.mark.cuda_fake,
              pytest.mark.skipif(torch.version.cuda is None, reason="torch is no CUDA build: make test-cuda-fake")]


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("d, e, K", [(128, 128, 2), (64, 64, 8), (192, 128, 8)])
def test_attention(fake, window, sinks, d, e, K):
    rows = [[Sample([1] * 100, [1] * 100)] * 5, [Sample([1] * 40, [1] * 40)] * 20]
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        batch = pack_rows(rows, 1024, 64)
    segments = tree.tree_map(lambda x: empty(*x.shape, dtype=x.dtype), batch).segments
    assert segments.longest == 1024                                  # the padding of the first
    q, k, v = empty(2, 1024, 8, d), empty(2, 1024, K, d), empty(2, 1024, K, e)
    o = attention.attend(q, k, v, segments=segments, window=window, sinks=empty(8) if sinks else None)
    assert o.shape == (2, 1024, 8, e) and o.dtype == q.dtype and o.device == q.device
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), torch.nn.functional.pad(v, (0, d - e)).flatten(0, 1)
    ends, options = empty(129, dtype=torch.int32), attention._flash_options(window, d ** -0.5)
    o, lse, *state = attention._flash(q, k, v, ends, 1024, options)
    gradients = attention._flash_backward(empty(2048, 8, d), q, k, v, o, lse, ends, 1024, options, state)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("D, width", [(64, 128), (64, 4), (12, 20), (7, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_products(fake, D, width, bias):
    """The bodies of the operators, which a fake tensor does not run by itself."""
    x, weight, offsets = empty(96, D), empty(4, width, D), empty(4, dtype=torch.int64)
    y = experts._grouped._init_fn(x, weight, empty(4, width) if bias else None, offsets)
    assert y.shape == (96, width) and y.is_contiguous() and y.device == x.device
    dx, dweight, dbias = experts._grouped_backward._init_fn(y, x, weight, offsets, True, bias)
    assert dx.shape == x.shape and dweight.shape == weight.shape and dx.is_contiguous() and dweight.is_contiguous()
    assert dbias.shape == ((4, width) if bias else (0,))


def test_routing_waits_for_nothing(fake):
    routed = experts.announce(empty(96, 2, dtype=torch.int64), 4)
    rows = experts.arrive(experts.dispatch(empty(96, 64), empty(96, 2), routed))
    assert experts.home(experts.combine(rows.x_ND, rows)).shape == (96, 64)


@pytest.mark.parametrize("make", [adamw, sgd, lion, muon], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_wait_for_nothing(fake, make, dtype, monkeypatch):
    monkeypatch.setattr(device, "has_fused_adamw", lambda where: False)      # of which there is no meta function
    params = {"w": empty(64, 128, dtype=dtype).requires_grad_(),
              "other": empty(64, 8, dtype=torch.float32).requires_grad_()}
    tx = chain(clip_by_global_norm(1.0), make(schedules.cosine(0.1, 10, 0.1)))
    grads = tree.tree_map(torch.empty_like, params)
    updates, _ = tx.update(grads, tx.init(params), params, ok=empty(dtype=torch.bool))
    assert all(u.device.type == "cuda" and u.shape == p.shape for p, u in tree.zip_leaves(params, updates))
