"""Optimizers against torch.optim, against formulas, and laws that all of them keep.

`eps` in bounds is the unit roundoff of the dtype, half the distance of neighbouring numbers at 1.
"""
import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from xtf import device, tree
from xtf.layout import like, local
from xtf.ops import LOCAL
from xtf.optim import (
    Optimizer,
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    lion,
    moments,
    muon,
    partition,
    schedules,
    sgd,
)

DONATE = replace(LOCAL, donate=True)
BIG = (1 << 19) + 3                                                        # more than one piece of a leaf


def make_params(dtype=torch.float32, seed=0, big=17):
    """A tree with a frozen leaf, a scalar, a leaf that is cut into pieces if `big`, and an empty one."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return {"embed": {"weight": draw(7, 5)},
            "layers": [{"w": draw(big), "norm": draw(5)}, {"w": draw(3, 4, 2), "norm": draw(5)}], "scalar": draw(),
            "empty": draw(0, 5), "frozen": draw(4).requires_grad_(False)}


def make_grads(params, seed):
    g = torch.Generator().manual_seed(seed)
    return tree.tree_map(lambda p: torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) if p.requires_grad
                         else None, params)


def clone(x):
    return tree.tree_map(lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor)
                         else t, x)


def step(tx, params, state, grads, ops=LOCAL):
    updates, state = tx.update(grads, state, params, ops)
    return apply_updates(params, updates, donate=ops.donate), state


def pairs(tree_, torch_params):
    return zip([p for p in tree.leaves(tree_) if p.requires_grad], torch_params, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay, masked", [(0.1, False), (0.0, False), (0.3, True)])
@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs_over_50_steps(dtype, weight_decay, masked, fused, monkeypatch):
    monkeypatch.setattr(device, "has_fused_adamw", lambda where: fused)
    lr, steps = 1e-2, 50
    params = make_params(dtype, big=BIG if masked else 17)
    theirs = [p.detach().clone().requires_grad_() for p in tree.leaves(params) if p.requires_grad]
    groups = [{"params": [p for p in theirs if p.ndim >= 2 or not masked], "weight_decay": weight_decay},
              {"params": [p for p in theirs if p.ndim < 2 and masked], "weight_decay": 0.0}]
    reference = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), foreach=False)
    tx = adamw(lr, weight_decay=weight_decay, mask=(lambda path, p: p.ndim >= 2) if masked else None)
    state = tx.init(params)
    for i in range(steps):
        grads = make_grads(params, i)
        for g, p in zip([g for g in tree.leaves(grads) if g is not None], theirs, strict=True):
            p.grad = g.clone()
        reference.step()
        params, state = step(tx, params, state, grads)
    # Each step rounds a parameter (below 8) at most twice on either side, and its update (below 10 lr) some ten times.
    unit = torch.finfo(dtype).eps / 2
    for ours, p in pairs(params, theirs):
        torch.testing.assert_close(ours, p, rtol=0, atol=steps * unit * (4 * 8 + 20 * 10 * lr))
    assert int(state["step"]) == steps
    for ours, name in ((state["m"], "exp_avg"), (state["v"], "exp_avg_sq")):   # averages of numbers below 6 and 36
        for x, p in zip([x for x in tree.leaves(ours) if x is not None], theirs, strict=True):
            torch.testing.assert_close(x, reference.state[p][name], rtol=0, atol=4 * unit * 36 / (1 - 0.95))


def test_adamw_follows_its_own_gradients_as_torch_does():
    """A quadratic: here rounding feeds back into the gradients."""
    g = torch.Generator().manual_seed(1)
    a = torch.randn(6, 6, generator=g, dtype=torch.float64)
    params = {"w": torch.randn(6, generator=g, dtype=torch.float64).requires_grad_()}
    w = params["w"].detach().clone().requires_grad_()
    loss = lambda w: (a @ w).square().sum()
    schedule = schedules.cosine(0.05, steps=50, warmup=0.2)
    reference = torch.optim.AdamW([w], lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    tx = chain(clip_by_global_norm(1.0), adamw(schedule))
    state = tx.init(params)
    for i in range(50):
        w.grad = torch.autograd.grad(loss(w), w)[0]
        norm = w.grad.norm()
        w.grad *= min(1.0, 1.0 / norm.item())
        reference.param_groups[0]["lr"] = float(schedule(torch.tensor(i)))
        reference.step()
        params, state = step(tx, params, state, {"w": torch.autograd.grad(loss(params["w"]), params["w"])[0]})
        torch.testing.assert_close(state[0]["norm"], norm, rtol=1e-10, atol=0)
    torch.testing.assert_close(params["w"], w, rtol=1e-12, atol=1e-12)


def test_bf16_parameters_are_rounded_once():
    lr, b1, b2, decay = 1e-2, 0.9, 0.95, 0.1
    tx = adamw(lr, weight_decay=decay)
    params = make_params(torch.bfloat16)
    state = tx.init(params)
    m, v = (tree.tree_map(lambda p: torch.zeros(p.shape, dtype=torch.float64), params) for _ in range(2))
    for t in range(1, 6):
        grads = make_grads(params, t)
        g64 = tree.tree_map(lambda p, g: torch.zeros(p.shape, dtype=torch.float64) if g is None else g.double(), params,
                            grads)
        m = tree.tree_map(lambda m, g: b1 * m + (1 - b1) * g, m, g64)
        v = tree.tree_map(lambda v, g: b2 * v + (1 - b2) * g * g, v, g64)
        adam = tree.tree_map(lambda m, v, c1=1 - b1**t, c2=1 - b2**t: m / c1 / ((v / c2).sqrt() + 1e-8), m, v)
        exact = tree.tree_map(lambda p, a: p.double() - lr * (a + decay * p.double()), params, adam)
        params, state = step(tx, params, state, grads)
        for p, x in zip(tree.leaves(params), tree.leaves(exact), strict=True):
            if p.requires_grad:
                assert p.dtype is torch.bfloat16
                # half a unit in the last place of bf16 for the one rounding, and float32's errors before it
                half = torch.finfo(torch.bfloat16).eps / 2 * torch.maximum(p.abs(), x.abs().to(p.dtype)).double()
                assert ((p.double() - x).abs() <= half + 1e-6).all()
    assert all(m is None or m.dtype is torch.float32 for m in tree.leaves((state["m"], state["v"])))


@pytest.mark.parametrize("max_norm", [0.1, 1e3, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clip_is_torchs(max_norm, dtype):
    params = make_params(dtype)
    grads = make_grads(params, 3)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in tree.leaves(params) if p.requires_grad]
    for p, g in zip(theirs, [g for g in tree.leaves(grads) if g is not None], strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    tx = clip_by_global_norm(max_norm)
    updates, state = tx.update(grads, tx.init(params), params, LOCAL)
    eps = torch.finfo(dtype).eps
    assert abs(state["norm"].item() / norm.item() - 1) < 100 * eps         # about as many terms
    for u, p in zip([u for u in tree.leaves(updates) if u is not None], theirs, strict=True):
        assert p.grad is not None
        # theirs divides by norm + 1e-6
        torch.testing.assert_close(u, p.grad, rtol=100 * eps + 1e-6 / norm.item(), atol=0)


def test_clip_of_nothing_and_of_nan():
    params = {"w": torch.zeros(2, requires_grad=True)}
    tx = clip_by_global_norm(1.0)
    updates, _ = tx.update({"w": torch.zeros(2)}, tx.init(params), params, LOCAL)
    assert updates["w"].tolist() == [0.0, 0.0]
    updates, state = tx.update({"w": torch.tensor([1.0, float("nan")])}, tx.init(params), params, LOCAL)
    assert updates["w"].isnan().all() and state["norm"].isnan()
    updates, state = tx.update({"w": None}, tx.init(params), params, LOCAL)
    assert updates == {"w": None} and state["norm"] == 0


OPTIMIZERS = {
    "adamw": adamw(1e-2),
    "no decay": adamw(1e-2, weight_decay=0.0),
    "masked, scheduled": adamw(schedules.linear(1e-2, steps=9, warmup=0.5), mask=lambda path, p: "norm" not in path),
    "clip": clip_by_global_norm(0.5),
    "clip, adamw": chain(clip_by_global_norm(0.5), adamw(schedules.constant(1e-2))),
    "nothing": chain(),
    "bf16": adamw(1e-2, moments="bf16"),
    "int8": chain(clip_by_global_norm(0.5), adamw(schedules.wsd(1e-2, steps=9), moments="int8")),
    "sgd": sgd(1e-2, weight_decay=0.1),
    "sgd, momentum": sgd(schedules.linear(1e-2, steps=9), momentum=0.9, nesterov=True),
    "lion": lion(1e-3, mask=lambda path, p: "norm" not in path),
    "muon, adamw": partition({"muon": muon(schedules.constant(1e-2)), "adamw": adamw(1e-3)},
                             lambda path, p: "muon" if p.ndim in (2, 3) and "embed" not in path else "adamw"),
}
# a leaf's parts on their own
ALONE = ("adamw", "no decay", "masked, scheduled", "clip", "clip, adamw", "nothing", "sgd", "sgd, momentum", "lion")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(moments, "LEAST", 32)
    monkeypatch.setattr(moments, "BLOCK", 2)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def equal_bits(a, b):
    return all((x is None) == (y is None)
               and (x is None or (x.dtype == y.dtype and torch.equal(bits(local(x)), bits(local(y)))))
               for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def taken(tx, params, state, grads, ok, ops=LOCAL):
    updates, state = tx.update(grads, state, params, ops, ok=torch.tensor(ok), norm=LOCAL.norm(grads))
    return apply_updates(params, updates, donate=ops.donate), state


laws = pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


@laws
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_law_none_stays_none_and_leaves_keep_their_kind(tx, dtype):
    params = make_params(dtype)
    state = tx.init(params)
    updates, new_state = tx.update(make_grads(params, 1), state, params, LOCAL)
    for p, u in zip(tree.leaves(params), tree.leaves(updates), strict=True):
        assert (u is None) == (not p.requires_grad)
        assert u is None or (u.shape == p.shape and u.dtype.itemsize >= p.dtype.itemsize and not u.requires_grad)
    kind = lambda x: tree.tree_map(lambda t: t if t is None else (t.shape, t.dtype, t.device), x)
    assert kind(new_state) == kind(state)
    new = apply_updates(params, updates)
    leaf = lambda x: tree.tree_map(lambda p: (p.shape, p.dtype, p.requires_grad, p.is_leaf), x)
    assert leaf(new) == leaf(params)
    assert new["frozen"] is params["frozen"]


@laws
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_law_donation_changes_no_bit_and_without_it_nothing_old_changes(tx, dtype):
    params = make_params(dtype, big=BIG if dtype is torch.float32 else 17)
    kept, given = (params, tx.init(params)), (clone(params), tx.init(params))
    for i in range(3):
        before = clone(kept)
        after = step(tx, *kept, make_grads(params, i))
        given_old = tree.leaves(given[0])
        given = step(tx, *given, make_grads(params, i), ops=DONATE)
        for a, b in zip(tree.leaves(kept), tree.leaves(before), strict=True):
            assert a is None or torch.equal(a, b)
        for a, b in zip(tree.leaves(after), tree.leaves(given), strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(given_old, tree.leaves(given[0]), strict=True))
        kept = after


@pytest.fixture
def last_of_four():
    """Rank 3 of 4 without the others: collectives do nothing, so only placement can be looked at."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_law_placement_is_kept(name, dtype, last_of_four):
    """A leaf may have no row on this rank; each shard's update is what the shard alone would get. (The others:
    tests/laws, on real ranks.)"""
    tx = OPTIMIZERS[name]

    def put(x, placements):
        local_ = x.detach()
        for dim, size, rank in ((0, 2, 1), (1, 2, 1)):
            p = placements[dim]
            if isinstance(p, Shard):
                chunk = -(-local_.shape[p.dim] // size)
                local_ = local_.narrow(p.dim, min(rank * chunk, local_.shape[p.dim]),
                                       max(0, min(chunk, local_.shape[p.dim] - rank * chunk)))
        return DTensor.from_local(local_.clone(), last_of_four, placements, run_check=False, shape=x.shape,
                                  stride=x.stride())

    where = {"rows": (Shard(0), Replicate()), "both": (Shard(1), Shard(0)), "nobody": (Shard(0), Shard(0)),
             "whole": (Replicate(), Replicate())}
    whole = {k: torch.randn(1 if k == "nobody" else 6, 3, dtype=dtype) for k in where}
    grads = {k: torch.randn_like(x) for k, x in whole.items()}
    params = {k: put(x, where[k]).requires_grad_() for k, x in whole.items()}
    ops = replace(LOCAL, norm=lambda grads: torch.tensor(2.0))
    plain = {k: local(p).clone().requires_grad_() for k, p in params.items()}
    assert plain["nobody"].numel() == 0
    updates, state = tx.update({k: put(g, where[k]) for k, g in grads.items()}, tx.init(params), params, ops)
    expected, plain_state = tx.update({k: local(put(g, where[k])).clone() for k, g in grads.items()}, tx.init(plain),
                                      plain, ops)
    new, plain_new = apply_updates(params, updates), apply_updates(plain, expected)
    for ours, alone, was in ((updates, expected, params), (new, plain_new, params)):
        for k, x in ours.items():
            assert isinstance(x, DTensor) and x.placements == where[k] and x.shape == was[k].shape, k
            assert x.dtype == local(x).dtype == x._spec.tensor_meta.dtype, k
            assert torch.equal(local(x), alone[k]), k
    assert all(x.requires_grad and x.dtype == dtype for x in new.values())
    for x, alone in zip(tree.leaves(state), tree.leaves(plain_state), strict=True):
        assert torch.equal(local(x), alone) and x.dtype == local(x).dtype
        assert not isinstance(x, DTensor) or x._spec.tensor_meta.dtype == x.dtype
    assert like(local(new["rows"]), params["rows"]).placements == where["rows"]


def test_apply_updates_alone():
    params = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([1.0], dtype=torch.bfloat16)}
    new = apply_updates(params, {"a": torch.tensor([0.5, 0.5]), "b": torch.tensor([0.001])})
    assert new["a"].tolist() == [1.5, 2.5] and new["a"].requires_grad and params["a"].tolist() == [1.0, 2.0]
    assert new["b"].dtype is torch.bfloat16 and new["b"].tolist() == [1.0]
    assert apply_updates(params, {"a": None, "b": None})["a"] is params["a"]
    with pytest.raises(ValueError, match=r"trees differ at the root: one has \['a', 'b'\] there, another \['a'\]"):
        apply_updates(params, {"a": None})


def test_errors_name_the_leaf():
    params = make_params()
    tx, state = adamw(1e-3), adamw(1e-3).init(params)
    grads = make_grads(params, 0)
    wrong = copy.copy(grads) | {"frozen": torch.ones(4)}
    with pytest.raises(ValueError, match=r"frozen .* its moments are None"):
        tx.update(wrong, state, params, LOCAL)
    wrong = copy.copy(grads) | {"scalar": torch.ones(2)}
    with pytest.raises(ValueError, match=r"scalar has a gradient of shape \(2,\), but its parameter has \(\)"):
        tx.update(wrong, state, params, LOCAL)
    with pytest.raises(ValueError, match=r"trees differ at the root: one has .* another \['scalar'\]"):
        tx.update({"scalar": None}, state, params, LOCAL)
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_by_global_norm(0.0)


@laws
def test_law_a_state_read_from_a_file_goes_on_bit_for_bit(tx):
    """Nothing of a run hides outside of the state's tensors."""
    params = make_params()
    params, state = step(tx, params, tx.init(params), make_grads(params, 0))
    file = io.BytesIO()
    torch.save([x for x in tree.leaves((params, state)) if x is not None], file)
    file.seek(0)
    read = iter(torch.load(file))
    fresh = make_params(seed=5)
    other = tree.tree_map(lambda x: x if x is None else next(read).requires_grad_(x.requires_grad),
                          (fresh, tx.init(fresh)))
    for i in range(1, 4):
        params, state = step(tx, params, state, make_grads(params, i))
        other = step(tx, *other, make_grads(params, i))
    assert equal_bits((params, state), other)


def not_ok_changes_no_bit(tx, dtype):
    """Whatever is in the gradients, before the first step and after one, donated or not; and one that is ok is as
    without `ok`."""
    params = make_params(dtype)
    with torch.no_grad():
        params["embed"]["weight"][0] = -0.0                                     # which 0.0 added to it would change
    now = params, tx.init(params)
    for i in range(2):
        for bad in (float("nan"), float("inf"), -1e30):
            for ops in (LOCAL, DONATE):
                grads = tree.tree_map(lambda g, bad=bad: None if g is None else g.masked_fill(g > 0, bad),
                                      make_grads(params, 9))
                assert equal_bits(taken(tx, *clone(now), grads, False, ops), now)
        plain = step(tx, *clone(now), make_grads(params, i))
        now = taken(tx, *now, make_grads(params, i), True)
        assert equal_bits(now, plain)


@laws
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_law_a_step_that_is_not_ok_changes_no_bit(tx, dtype, fused, monkeypatch):
    monkeypatch.setattr(device, "has_fused_adamw", lambda where: fused)
    if tx in (OPTIMIZERS["clip"], OPTIMIZERS["nothing"]):  # gradients are for the next in a chain to leave out
        _, state = tx.update({"w": torch.ones(2)}, tx.init({}), {"w": torch.ones(2)}, ok=torch.tensor(False))
        assert equal_bits(state, tx.init({}))
    else:
        not_ok_changes_no_bit(tx, dtype)


def scaled(fn):
    """An optimizer without a state, whose updates are fn(gradient, ok)."""
    return Optimizer(lambda params: (), lambda grads, state, params, ops=LOCAL, norm=None, ok=None: (
        tree.tree_map(lambda g: None if g is None else fn(g, torch.tensor(True) if ok is None else ok), grads), state))


def test_forgetting_ok_is_caught():
    not_ok_changes_no_bit(scaled(lambda g, ok: torch.where(ok, g * -0.1, -0.0)), torch.float32)
    for wrong in (lambda g, ok: g * -0.1, lambda g, ok: g * -0.1 * ok, lambda g, ok: torch.where(ok, g * -0.1, 0.0)):
        with pytest.raises(AssertionError):
            not_ok_changes_no_bit(scaled(wrong), torch.float32)


def test_extras():
    params = {"w": torch.ones(2, requires_grad=True)}
    def refuse(grads):
        raise AssertionError("the norm was given")
    tx = chain(clip_by_global_norm(1.0), sgd(1.0))
    updates, state = tx.update({"w": torch.ones(2)}, tx.init(params), params, replace(LOCAL, norm=refuse),
                               norm=torch.tensor(10.0))
    assert updates["w"].tolist() == pytest.approx([-0.1, -0.1]) and state[0]["norm"] == 10
    twice = chain(clip_by_global_norm(1.0), clip_by_global_norm(1.0))  # the second clips what the first one left
    updates, state = twice.update({"w": torch.tensor([3.0, 4.0])}, twice.init(params), params, norm=torch.tensor(5.0))
    assert state[1]["norm"].item() == pytest.approx(1.0)
    for tx in (adamw(1.0), sgd(1.0), lion(1.0), clip_by_global_norm(1.0)):
        with pytest.raises(TypeError, match=r"unknown extras \['okay'\]; known are norm and ok"):
            tx.update({"w": torch.ones(2)}, tx.init(params), params, okay=torch.tensor(True))


@pytest.mark.parametrize("donate", [False, True])
def test_leaves_that_are_not_contiguous(donate):
    """Larger than a piece of the walk: what would be cut from a copy would be lost."""
    shape = (1200, 1000)
    g, w, m, v = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(4))
    tx = adamw(1e-2)

    def step(arrange):
        params = {"w": arrange(w).requires_grad_()}
        state = tx.init(params) | {"m": {"w": arrange(m)}, "v": {"w": arrange(v.abs())}}
        return tx.update({"w": arrange(g)}, state, params, replace(LOCAL, donate=donate))
    (u, new), (expected, expected_new) = step(lambda x: x.t().contiguous().t()), step(torch.clone)
    for a, b in ((u, expected), (new["m"], expected_new["m"]), (new["v"], expected_new["v"])):
        assert torch.equal(a["w"], b["w"])


class Scalars(TorchDispatchMode):
    """Notes operators that have a tensor, or a list, and a scalar tensor of a wider dtype beside it: on CUDA lists go
    leaf by leaf then, and tensors through a kernel that converts as it reads."""

    def __init__(self):
        super().__init__()
        self.mixed = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        floats = [x for x in tree.leaves((*args, *(kwargs or {}).values()))
                  if isinstance(x, torch.Tensor) and x.is_floating_point()]
        wide = {torch.promote_types(x.dtype, torch.float32) for x in floats if x.ndim}
        lists = [{x.dtype for x in a} for a in args if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)]
        name = func._schema.name
        scalars = {x.dtype for x in floats if not x.ndim}
        if (wide and scalars - wide) or (name.startswith("aten::_foreach_mul") and any(len(one) > 1 for one in lists)):
            self.mixed.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
def test_scalars_have_the_dtype_of_what_they_multiply(monkeypatch, fused):
    monkeypatch.setattr(device, "has_fused_adamw", lambda where: fused)
    lr = schedules.cosine(0.1, 10)
    txs = adamw(lr), adamw(lr, moments="int8"), sgd(lr, momentum=0.9, weight_decay=0.1), lion(lr), muon(lr)
    for tx, dtype in itertools.product(txs, (torch.float32, torch.bfloat16, torch.float64)):
        g = torch.Generator().manual_seed(0)
        params = {"w": torch.randn(64, 80, generator=g).to(dtype).requires_grad_(),
                  "other": torch.randn(3, 5, generator=g).to(torch.float32).requires_grad_()}
        tx = chain(clip_by_global_norm(0.1), tx)
        grads, state = make_grads(params, 1), tx.init(params)
        with Scalars() as seen:
            tx.update(grads, state, params, ok=torch.tensor(True))
        # CPU's fused kernel reads the learning rate in any dtype, CUDA's is given a float32
        assert not seen.mixed - {"aten::copy_", "aten::_fused_adamw_"}, dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipping_rounds_as_torch_rounds_a_float64_scalar(dtype):
    params = make_params(dtype) | {"wide": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    grads, tx = make_grads(params, 3), clip_by_global_norm(0.37)
    expected = clone(grads)
    norm = LOCAL.norm(grads).double()
    for g in tree.leaves(expected):
        if g is not None:
            g.detach().mul_((0.37 / norm).clamp(max=1))
    got, _ = tx.update(grads, tx.init(params), params, norm=norm)
    for a, b in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        if a is None or a.ndim:
            assert a is b is None or torch.equal(a, b)
        else:                                                        # two scalars are multiplied in float64
            torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=0)
