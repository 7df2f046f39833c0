"""Tokens to experts and back against the dense formula in float64: y_t = sum_k w_tk * expert(e_tk)(x_t); and each part
by itself."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from xtf.kernels import experts as kernel
from xtf.kernels import swiglu
from xtf.kernels.experts import announce, arrive, collect, combine, dispatch, grouped_linear, home, spread
from xtf.kernels.swiglu import weighted_swiglu

EXACT = 1e-12                                                      # float64, sums of at most 20 terms of size 10


def leaf(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype).requires_grad_()


def layer(x_TD, weights_TK, up, down, experts_TK):
    """Two products with a nonlinearity between; the weight multiplies the outputs, since there is a bias."""
    rows = arrive(dispatch(x_TD, weights_TK, announce(experts_TK, len(up["weight"]))))
    h = torch.tanh(grouped_linear(rows.x_ND, up, rows.offsets_E, ("embed", "mlp")))
    y_ND = grouped_linear(h, down, rows.offsets_E, ("mlp", "embed"))
    return home(combine(y_ND * rows.weights_N[:, None], rows))


def dense(x_TD, weights_TK, up, down, experts_TK):
    """Every expert on every token, most of it multiplied by zero."""
    bias = lambda node: node["bias"][:, None] if "bias" in node else 0
    h = torch.tanh(torch.einsum("td,efd->etf", x_TD, up["weight"]) + bias(up))
    y_ETD = torch.einsum("etf,edf->etd", h, down["weight"]) + bias(down)
    gate_ET = ((experts_TK == torch.arange(len(up["weight"]))[:, None, None]) * weights_TK).sum(-1)
    return (gate_ET[..., None] * y_ETD).sum(0)


def assert_same(got, expected, leaves, tolerance=EXACT):
    g = torch.randn(expected.shape, dtype=expected.dtype)
    grads = [torch.autograd.grad(y, leaves, g, materialize_grads=True) for y in (got, expected)]
    for a, b in zip([got, *grads[0]], [expected, *grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.data())
def test_the_layer_is_the_dense_formula(T, K, E, bias, data):
    choices = data.draw(st.lists(st.permutations(range(E)).map(lambda p: [*p, *[-1] * K][:K]), min_size=T, max_size=T))
    gone = data.draw(st.lists(st.booleans(), min_size=T * K, max_size=T * K))
    gone_TK = torch.tensor(gone, dtype=torch.bool).view(T, K)
    experts_TK = torch.tensor(choices, dtype=torch.int64).view(T, K).masked_fill(gone_TK, -1)
    up, down = {"weight": leaf(E, 4, 3)}, {"weight": leaf(E, 3, 4)}
    if bias:
        up, down = up | {"bias": leaf(E, 4)}, down | {"bias": leaf(E, 3)}
    args = leaf(T, 3), leaf(T, K), up, down, experts_TK
    assert_same(layer(*args), dense(*args), [*args[:2], *up.values(), *down.values()])


EXPERTS_TK = torch.tensor([[0, 1], [1, -1], [3, 0], [-1, -1], [1, 3], [0, 3]])          # expert 2 of 4 gets nobody
PAIRS = 9


def gated(x_TD, weights_TK, gate, gate_bias, up, down, experts_TK=EXPERTS_TK):
    """As Qwen3-MoE has it: the weight multiplies the narrow rows."""
    rows = arrive(dispatch(x_TD, weights_TK, announce(experts_TK, len(gate))))
    both = (grouped_linear(rows.x_ND, node, rows.offsets_E)
            for node in ({"weight": gate, "bias": gate_bias}, {"weight": up}))
    return home(combine(grouped_linear(weighted_swiglu(*both, rows.weights_N), {"weight": down}, rows.offsets_E), rows))


def gated_leaves(dtype=torch.float64):
    shapes = (6, 8), (6, 2), (4, 8, 8), (4, 8), (4, 8, 8), (4, 8, 8)
    return [leaf(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def value_and_gradients(fn, leaves):
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def test_compiled_whole_and_once_for_every_routing():
    count = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(gated, fullgraph=True, backend=count)
    leaves = gated_leaves()
    for experts_TK in (EXPERTS_TK, torch.full((6, 2), -1), torch.tensor([[2, 0]]).repeat(6, 1)):
        got, expected = (value_and_gradients(lambda *args, fn=fn, e=experts_TK: fn(*args, e), leaves)
                         for fn in (compiled, gated))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    assert count.frame_count == 1


def test_under_torch_func():
    leaves = gated_leaves()
    loss = lambda *args: gated(*args).square().sum()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    values = tuple(x.detach() for x in leaves)
    for a, b in zip(torch.func.grad(loss, tuple(range(6)))(*values), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    _, along = torch.func.jvp(loss, values, tuple(torch.ones_like(x) for x in values))
    torch.testing.assert_close(along, sum(g.sum() for g in expected), rtol=EXACT, atol=EXACT)
    # each example with a routing of its own
    experts_BTK = torch.stack([EXPERTS_TK, EXPERTS_TK.flip(0), torch.full((6, 2), -1)])
    x_BTD = torch.stack([values[0], 2 * values[0], values[0]])
    one = lambda x, e, weights, *params: gated(x, weights, *params, e).square().sum()
    by_example = torch.func.vmap(torch.func.grad(one, argnums=(0, 2, 3, 4, 5, 6)),
                                 in_dims=(0, 0, *[None] * 5))(x_BTD, experts_BTK, *values[1:])
    for i in range(3):
        inputs = [x_BTD[i].clone().requires_grad_(), *leaves[1:]]
        want = torch.autograd.grad(gated(*inputs, experts_BTK[i]).square().sum(), inputs)
        for a, b in zip(by_example, want, strict=True):
            torch.testing.assert_close(a[i], b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("experts_TK", [EXPERTS_TK, torch.full((6, 2), -1), EXPERTS_TK.clamp(min=0)])
def test_flops_are_those_of_the_pairs(experts_TK):
    leaves, pairs = gated_leaves(), int((experts_TK >= 0).sum())
    with FlopCounterMode(display=False) as forward:
        y = gated(*leaves, experts_TK)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 3 * 2 * pairs * 8 * 8
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    frozen = [x.detach().requires_grad_(x.dim() == 2) for x in leaves]
    with FlopCounterMode(display=False) as backward:
        gated(*frozen, experts_TK).sum().backward()
    # products of the forward pass, and of x's gradient
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def saved(fn):
    """Elements that autograd saves, by shape."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append((tuple(x.shape), x.data_ptr()))
                                                  or x, lambda x: x):
        fn()
    return sorted(shape for shape, _ in set(shapes))


def test_what_is_saved(monkeypatch):
    """The rows once though two products read them, what the gate needs, h; nothing on the way home."""
    monkeypatch.setattr(swiglu, "SMALL", 0)
    leaves = gated_leaves()
    weights, offsets = [(4, 8, 8)] * 3, [(4,)]
    assert saved(lambda: gated(*leaves)) == sorted([*weights, *offsets, *[(12, 8)] * 4, (12,)])
    frozen = [x.detach().requires_grad_(x.dim() < 3) for x in leaves]
    # neither the rows nor h
    assert saved(lambda: gated(*frozen)) == sorted([*weights, *offsets, *[(12, 8)] * 2, (12,)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fake_tensors_have_the_shapes_of_real_ones(dtype):
    leaves = gated_leaves(dtype)
    real = value_and_gradients(gated, leaves)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = value_and_gradients(gated, [mode.from_tensor(x) for x in leaves])
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_every_choice_takes_the_same_memory():
    """Of all tokens to two experts, to nobody, or to all alike: the rows' shapes do not tell."""
    shapes = lambda e: [tuple(x.shape) for x in (lambda rows: (rows.x_ND, rows.weights_N, rows.offsets_E))(
        arrive(dispatch(leaf(6, 8), leaf(6, 2), announce(e, 4))))]
    nobody, two = torch.full((6, 2), -1), torch.tensor([[2, 0]]).expand(6, 2)
    assert shapes(EXPERTS_TK) == shapes(nobody) == shapes(two) == [(12, 8), (12,), (4,)]


# ---------------------------------------------------------------- the moves

@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_spread_and_collect_are_a_matrix_and_its_transpose(A, B, extra, random):
    """`src` is drawn, with A for nowhere; `where` says the same from the other side, with B for nowhere."""
    src = [random.randint(0, A) for _ in range(B)]
    places = [[b for b in range(B) if src[b] == a] for a in range(A)]
    K = max([1, *map(len, places)]) + (extra == 5)
    src_B = torch.tensor(src, dtype=torch.int64)
    where_AK = torch.tensor([p + [B] * (K - len(p)) for p in places], dtype=torch.int64).view(A, K)
    hot_BA = (src_B[:, None] == torch.arange(A)).double()
    x_AD, y_BD = leaf(A, 3), leaf(B, 3)
    assert_same(spread(x_AD, src_B, where_AK), hot_BA @ x_AD, [x_AD])
    assert_same(collect(y_BD, src_B, where_AK), hot_BA.T @ y_BD, [y_BD])
    torch.testing.assert_close(kernel._rows(x_AD, src_B), hot_BA @ x_AD)  # what other devices run
    torch.testing.assert_close(kernel._summed(y_BD, where_AK), hot_BA.T @ y_BD, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("gone", [False, True])
def test_sums_in_bf16_are_rounded_once(gone):
    y_BD, where_AK = leaf(40, 16, dtype=torch.bfloat16).detach(), torch.randperm(40).view(10, 4)
    if gone:
        where_AK[::2, 1] = 40
    exact = torch.nn.functional.pad(y_BD.double(), (0, 0, 0, 1))[where_AK].sum(1)
    for got in (collect(y_BD, torch.empty(0, dtype=torch.int64), where_AK), kernel._summed(y_BD, where_AK)):
        assert got.dtype == torch.bfloat16
        # half a unit, and float32's own error
        assert ((got.double() - exact).abs() <= 2 ** -8 * exact.abs() + 2 ** -20).all()


# ---------------------------------------------------------------- products

NARROW = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("dtype", "computed"), NARROW)
def test_narrow_products_lose_no_more_than_their_rounding(monkeypatch, dtype, computed):
    monkeypatch.setattr(kernel, "product_dtype", lambda *_: computed)
    x, weight, bias = leaf(12, 8, dtype=dtype), leaf(4, 8, 8, dtype=dtype), leaf(4, 8, dtype=dtype)
    offsets, g = announce(EXPERTS_TK, 4).offsets_E, leaf(12, 8, seed=9, dtype=dtype).detach()
    got = grouped_linear(x, {"weight": weight, "bias": bias}, offsets)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = kernel.reference_grouped_linear(*wide, offsets)
    sizes = kernel.reference_grouped_linear(*(t.abs() for t in wide), offsets)  # of the terms that are summed
    gradients = (torch.autograd.grad(got, (x, weight, bias), g),
                 torch.autograd.grad(expected, wide, g.double(), retain_graph=True))
    magnitudes = [d.abs() for d in torch.autograd.grad(sizes, wide, g.double().abs())]
    unit = torch.finfo(dtype).eps  # a product's rounding, and the result's
    for a, b, size in zip([got, *gradients[0]], [expected, *gradients[1]], [sizes, *magnitudes], strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= unit * size).all()


class Calls(list):
    """What was called, in order."""


@pytest.fixture
def grouped_mm(monkeypatch):
    """`F.grouped_mm` as CUDA has it: it refuses rows that are no multiple of 16 bytes of bf16, and leaves rows past the
    last offset and weights of experts without rows as they were. On CPU it runs in float32. Returns the list of its
    operands' shapes; what ran before `calls.start()` ran as on a CPU."""
    calls = Calls()
    real = torch.nn.functional.grouped_mm

    def spoilt(a, b, *, offs):
        for x in (a, b):
            (rows, columns), (down, across) = x.shape[-2:], x.stride()[-2:]
            wide = (down, columns) if across == 1 else (across, rows)
            assert 1 in (across, down) and wide[0] >= wide[1] and wide[0] % 8 == 0
        calls.append((tuple(a.shape), tuple(b.shape)))
        y = real(a, b, offs=offs)
        if b.dim() == 3:
            y[offs[-1]:] = torch.nan
        else:
            y[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return y

    def host(*_):
        raise AssertionError("the host waits for the offsets")

    def start():
        monkeypatch.setattr(kernel.F, "grouped_mm", spoilt)
        monkeypatch.setattr(kernel, "_grouped_on_device", lambda *xs: all(x.numel() for x in xs))
        monkeypatch.setattr(kernel, "_sizes", host)
    calls.start = start
    return calls


def test_the_way_of_an_accelerator(grouped_mm):
    leaves = gated_leaves(torch.float32)
    exact = value_and_gradients(gated, [x.detach().double().requires_grad_() for x in leaves])
    grouped_mm.start()
    for a, b in zip(value_and_gradients(gated, leaves), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert len(grouped_mm) == 9


@pytest.mark.parametrize("D, width", [(16, 24), (16, 4), (16, 12), (20, 1), (7, 9)])
def test_widths_that_are_no_multiple_of_16_bytes_go_to_the_accelerators_kernel(grouped_mm, D, width):
    """An adapter's rank of 4 or 12, say: with zeros after it, which change no value and no gradient."""
    x, weight, bias = (leaf(*shape, seed=i, dtype=torch.float32) for i, shape in
                       enumerate([(11, D), (3, width, D), (3, width)]))
    offsets, g = torch.tensor([4, 4, 9]), torch.randn(11, width)
    grouped_mm.start()
    got = grouped_linear(x, {"weight": weight, "bias": bias}, offsets)
    gradients = torch.autograd.grad(got, (x, weight, bias), g)
    expected = kernel.reference_grouped_linear(x, weight, bias, offsets)
    for a, b in zip((got, *gradients), (expected, *torch.autograd.grad(expected, (x, weight, bias), g)), strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(grouped_mm) == 3 and all(n % 8 == 0 for a, b in grouped_mm[:2] for n in (a[1], *b[1:]))


def test_no_rows_wait_for_nobody(grouped_mm):
    x, weight, bias = leaf(0, 8), leaf(3, 8, 8), leaf(3, 8)
    grouped_mm.start()
    y = grouped_linear(x, {"weight": weight, "bias": bias}, torch.zeros(3, dtype=torch.int64))
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == (0, 8) and not dweight.any() and not dbias.any() and not grouped_mm


def test_rows_past_the_last_offset_are_zeros_whatever_they_hold():
    x, weight, bias = leaf(4, 2), leaf(2, 3, 2), leaf(2, 3)
    with torch.no_grad():
        x[2:] = torch.nan
    y = grouped_linear(x, {"weight": weight, "bias": bias}, torch.tensor([1, 2]))
    assert (y[2:] == 0).all() and y[:2].all()
    g = torch.full_like(y, torch.nan)
    g[:2] = 1
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), g)
    assert (dx[2:] == 0).all() and dx[:2].all() and torch.equal(dbias, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(dweight, x[:2].detach()[:, None].expand(2, 3, 2))


def test_operators_are_sound():
    """torch's own checks: schemas, fake kernels, autograd registration, aot dispatch with dynamic shapes."""
    p = announce(EXPERTS_TK, 4)
    x, weight, bias, g = leaf(12, 8), leaf(4, 8, 8), leaf(4, 8), leaf(12, 8, seed=3).detach()
    check = torch.library.opcheck
    check(torch.ops.xtf.spread.default, (leaf(6, 8), p.pairs_N // 2, p.where_TK))
    check(torch.ops.xtf.collect.default, (x, p.pairs_N // 2, p.where_TK))
    for b in (None, bias):
        check(torch.ops.xtf.grouped_linear.default, (x, weight, b, p.offsets_E))
    for rows in (None, x.detach()):
        check(torch.ops.xtf.grouped_linear_backward.default,
              (g, rows, weight.detach(), p.offsets_E, True, rows is None))


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="2 offsets but a weight of 3 experts"):
        grouped_linear(torch.ones(4, 2), {"weight": torch.ones(3, 3, 2)}, torch.tensor([1, 2]), ("embed", "mlp"))
    for experts in ([[0, 3]], [[-2, 0]]):
        with pytest.raises(ValueError, match="there are 3 experts"):
            announce(torch.tensor(experts), 3)
