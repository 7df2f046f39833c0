"""Tokens to experts and back against the dense formula in float64: y_t = sum_k w_tk * expert(e_tk)(x_t)."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xtf.kernels.experts import arrive, combine, dispatch, grouped_linear, home, plan


def layer(x_TD, weights_TK, up, down, experts_TK):
    """Two products with a nonlinearity between; the weight multiplies the outputs, since there is a bias."""
    rows = arrive(dispatch(x_TD, weights_TK, plan(experts_TK, len(up["weight"]))))
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


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.data())
def test_the_layer_is_the_dense_formula(T, K, E, bias, data):
    choices = data.draw(st.lists(st.permutations(range(E)).map(lambda p: [*p, *[-1] * K][:K]), min_size=T, max_size=T))
    gone = data.draw(st.lists(st.booleans(), min_size=T * K, max_size=T * K))
    experts_TK = torch.tensor(choices, dtype=torch.int64).view(T, K).masked_fill(torch.tensor(gone, dtype=torch.bool).view(T, K), -1)
    leaf = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()
    up, down = {"weight": leaf(E, 4, 3)}, {"weight": leaf(E, 3, 4)}
    if bias:
        up, down = up | {"bias": leaf(E, 4)}, down | {"bias": leaf(E, 3)}
    x_TD, weights_TK = leaf(T, 3), leaf(T, K)
    leaves = [x_TD, weights_TK, *up.values(), *down.values()]
    got, expected = layer(x_TD, weights_TK, up, down, experts_TK), dense(x_TD, weights_TK, up, down, experts_TK)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(expected.shape, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, leaves, g, materialize_grads=True), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_past_the_last_offset_are_zeros():
    out = grouped_linear(torch.ones(4, 2), {"weight": torch.ones(2, 3, 2)}, torch.tensor([1, 2]))
    assert out.sum(1).tolist() == [6, 6, 0, 0]


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="2 offsets but a weight of 3 experts"):
        grouped_linear(torch.ones(4, 2), {"weight": torch.ones(3, 3, 2)}, torch.tensor([1, 2]), ("embed", "mlp"))
    for experts in ([[0, 3]], [[-2, 0]]):
        with pytest.raises(ValueError, match="there are 3 experts"):
            plan(torch.tensor(experts), 3)
