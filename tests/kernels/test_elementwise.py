"""swiglu, plain and weighted, against torch's silu, apply_rope against transformers'; gradients, what they save, and
that they compile whole."""
import pytest
import torch
import torch.nn.functional as F
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from xtf.kernels import swiglu as swiglu_kernel
from xtf.kernels.rope import apply_rope, reference_rope
from xtf.kernels.swiglu import swiglu, weighted_swiglu

EXACT = 1e-13


def leaf(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def angles(P, T, d, dtype=torch.float64):
    half = torch.randn(P, T, d // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).mul(3)
    both = torch.cat([half, half], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def saved_elements(fn, *args):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        fn(*args)
    return sum(sizes)


def assert_same(fn, expected_fn, inputs):
    got, expected = fn(*inputs), expected_fn(*inputs)
    g = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(5))
    for a, b in zip([got, *torch.autograd.grad(got, inputs, g)], [expected, *torch.autograd.grad(expected, inputs, g)],
                    strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("small", [0, 2 ** 16])
def test_swiglu_is_the_formula(monkeypatch, small):
    monkeypatch.setattr(swiglu_kernel, "SMALL", small)
    assert_same(swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, [leaf(5, 7), leaf(5, 7, seed=1)])
    both = leaf(5, 14)  # halves of one product: rows with gaps between them
    assert_same(lambda both: swiglu(*both.chunk(2, -1)), lambda both: F.silu(both.chunk(2, -1)[0])
                * both.chunk(2, -1)[1], [both])


def test_swiglu_saves_its_inputs_alone(monkeypatch):
    monkeypatch.setattr(swiglu_kernel, "SMALL", 0)
    assert saved_elements(swiglu, leaf(5, 7), leaf(5, 7)) == 2 * 35


@pytest.mark.parametrize(("small", "piece"), [(2 ** 16, 1), (0, 2 ** 16), (0, 16), (0, 1)])
def test_weighted_swiglu_is_the_formula(monkeypatch, small, piece):
    monkeypatch.setattr(swiglu_kernel, "SMALL", small)
    monkeypatch.setattr(swiglu_kernel, "PIECE", piece)                          # rows at a time: all, two, one
    formula = lambda gate, up, weights: gate * torch.sigmoid(gate) * up * weights[:, None]
    weights = leaf(5, seed=2)
    with torch.no_grad():
        weights[1] = 0  # its gradient is not that of a product divided by it
    assert_same(weighted_swiglu, formula, [leaf(5, 7), leaf(5, 7, seed=1), weights])
    both = leaf(5, 14)
    assert_same(lambda *x: weighted_swiglu(*x[0].chunk(2, -1), x[1]), lambda *x: formula(*x[0].chunk(2, -1), x[1]),
                [both, weights])
    assert_same(weighted_swiglu, formula, [leaf(0, 7), leaf(0, 7), leaf(0)])
    assert_same(lambda w: weighted_swiglu(both[:, :7], both[:, 7:], w), lambda w: formula(both[:, :7], both[:, 7:], w),
                [weights])


def test_weighted_swiglu_in_bf16_with_wide_weights(monkeypatch):
    """As experts call it: narrow rows, float32 weights. Each of at most four operations rounds by half a unit; sums are
    wide."""
    monkeypatch.setattr(swiglu_kernel, "SMALL", 0)
    inputs = (leaf(6, 8, dtype=torch.bfloat16), leaf(6, 8, seed=1, dtype=torch.bfloat16),
              leaf(6, seed=2, dtype=torch.float32))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = weighted_swiglu(*inputs), F.silu(exact[0]) * exact[1] * exact[2][:, None]
    g = leaf(6, 8, seed=5, dtype=torch.bfloat16).detach()
    # of the weights' gradients' terms
    size = (F.silu(exact[0]).abs() * exact[1].abs() * g.double().abs()).sum(1).detach()
    sizes = [None, None, None, size]
    for a, b, like, size in zip([got, *torch.autograd.grad(got, inputs, g)],
                                [expected, *torch.autograd.grad(expected, exact, g.double())], [inputs[0], *inputs],
                                sizes, strict=True):
        assert a.dtype == like.dtype
        assert ((a.double() - b).abs() <= 4 * 2 ** -8 * (b.abs() if size is None else size)).all()


def test_weighted_swiglu_saves_its_inputs_alone(monkeypatch):
    monkeypatch.setattr(swiglu_kernel, "SMALL", 0)
    assert saved_elements(weighted_swiglu, leaf(5, 7), leaf(5, 7), leaf(5)) == 2 * 35 + 5


@pytest.mark.parametrize("heads_first", [False, True])
def test_rope_is_transformers(heads_first):
    x = leaf(2, 4, 6, 8).transpose(1, 2) if heads_first else leaf(2, 6, 4, 8)
    cos, sin = angles(2, 6, 8)
    theirs = lambda x: apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]
    assert_same(lambda x: apply_rope(x, cos, sin), theirs, [x.detach().requires_grad_()])


def test_rope_with_other_angles_in_each_half():
    cos, sin = torch.rand(2, 2, 6, 8, dtype=torch.float64)
    assert_same(lambda x: apply_rope(x, cos, sin), lambda x: apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0],
                [leaf(2, 6, 4, 8)])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_of_the_last_dims(interleaved):
    """DeepSeek's heads: dims without a position in front; transformers lays interleaved pairs out as halves, we leave
    them."""
    cos, sin = angles(2, 6, 8)

    def theirs(x):
        kept, x = x.split((x.shape[-1] - 8, 8), -1)
        if not interleaved:
            return torch.cat([kept, apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]], -1)
        halves = apply_rotary_pos_emb_interleave(x, x, cos, sin, unsqueeze_dim=2)[0]
        return torch.cat([kept, halves.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2)], -1)
    for x in (leaf(2, 6, 3, 13), leaf(2, 6, 3, 8), leaf(2, 6, 1, 11)[..., 2:]):
        x = x.detach().requires_grad_()
        assert_same(lambda x: apply_rope(x, cos, sin, interleaved), theirs, [x])
        assert_same(lambda x: reference_rope(x, cos, sin, interleaved), theirs, [x])


def test_rope_in_bf16_is_rounded_once():
    x, (cos, sin) = leaf(1, 6, 2, 8, dtype=torch.bfloat16), angles(1, 6, 8, torch.float32)
    got = apply_rope(x, cos, sin)
    exact = apply_rotary_pos_emb(x.double(), x.double(), cos.double(), sin.double(), unsqueeze_dim=2)[0]
    assert got.dtype == torch.bfloat16
    # half a unit of bf16, and float32's own error
    assert ((got.double() - exact).abs() <= 2 ** -8 * exact.abs() + 2 ** -20).all()
    assert torch.autograd.grad(got.sum(), x)[0].dtype == torch.bfloat16


def test_rope_saves_its_angles_alone():
    cos, sin = angles(1, 6, 8)
    assert saved_elements(apply_rope, leaf(1, 6, 4, 8), cos, sin) == 2 * 48


def test_rope_where_the_angles_need_gradients():
    x, (cos, sin) = leaf(1, 3, 2, 4), angles(1, 3, 4)
    leaves = [x, cos.requires_grad_(), sin.requires_grad_()]
    assert_same(apply_rope, lambda x, cos, sin: apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0], leaves)


def test_under_torch_func_and_compile():
    x, gate, (cos, sin) = leaf(2, 6, 4, 8), leaf(2, 6, 4, 8, seed=1), angles(2, 6, 8)
    fn = lambda x, gate: swiglu(gate, apply_rope(x, cos, sin)).square().sum()
    expected = torch.autograd.grad(fn(x, gate), (x, gate))
    one = lambda x, gate, cos, sin: swiglu(gate[None], apply_rope(x[None], cos[None], sin[None])).square().sum()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    by_example = torch.func.vmap(torch.func.grad(one, argnums=(0, 1)))(x.detach(), gate.detach(), cos, sin)
    for got in (by_example, torch.autograd.grad(compiled(x, gate), (x, gate))):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    tangents = torch.ones_like(x), torch.ones_like(gate)
    _, along = torch.func.jvp(fn, (x.detach(), gate.detach()), tangents)
    torch.testing.assert_close(along, sum(g.sum() for g in expected), rtol=EXACT, atol=EXACT)


def test_errors_say_what_does_not_fit():
    cos, sin = angles(1, 6, 8)
    with pytest.raises(ValueError, match="must be alike"):
        swiglu(leaf(5, 7), leaf(5, 6))
    for args in ((leaf(5, 7), leaf(5, 6), leaf(5)), (leaf(5, 7), leaf(5, 7), leaf(7)),
                 (leaf(5, 7), leaf(5, 7, dtype=torch.float32), leaf(5))):
        with pytest.raises(ValueError, match="weighted_swiglu"):
            weighted_swiglu(*args)
    for x in (leaf(6, 4, 8), leaf(1, 5, 4, 8), leaf(1, 6, 4, 6)):
        with pytest.raises(ValueError, match="do not fit"):
            apply_rope(x, cos, sin)
