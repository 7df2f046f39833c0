"""linear_cross_entropy and token_logprobs against torch's cross_entropy on whole logits in float64; gradients too."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from xtf.kernels import cross_entropy
from xtf.kernels.cross_entropy import linear_cross_entropy, reference, token_logprobs

EXACT = 1e-12                       # float64, sums of at most 100 terms of size 10


def drawn(T, V, D, dtype=torch.float64, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, D, generator=g, dtype=torch.float64).mul(size).to(dtype).requires_grad_()
                 for n in (T, V))
    labels = torch.randint(V, (T,), generator=g)
    weights = torch.rand(T, generator=g) * (torch.rand(T, generator=g) > 0.3)
    return x, weight, labels, weights


def formula(x, weight, labels, weights, z_loss=0.0):
    """Torch's own cross-entropy of whole logits, and the z-loss written out."""
    logits = x @ weight.T
    return (F.cross_entropy(logits, labels, reduction="none")
            * weights).sum() + z_loss * (logits.exp().sum(-1).log() ** 2 * weights).sum()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK", 8 * 5)
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", 0)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 9), st.sampled_from([0.0, 0.1]),
       st.sampled_from([(True, True), (True, False), (False, True)]))
def test_loss_and_gradients_are_the_formulas(T, V, D, z_loss, needs):
    x, weight, labels, weights = drawn(T, V, D)
    for leaf, need in zip((x, weight), needs, strict=True):
        leaf.requires_grad_(need)
    wanted = [leaf for leaf in (x, weight) if leaf.requires_grad]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "MIN_CHUNK", 8 * 5)
        patch.setattr(cross_entropy, "CPU_LOGITS", 0)
        loss = linear_cross_entropy(x, weight, labels, weights, z_loss=z_loss)
    expected = formula(x, weight, labels, weights, z_loss)
    torch.testing.assert_close(loss, expected, rtol=EXACT, atol=EXACT)
    for a, b in zip(torch.autograd.grad(loss * 0.3, wanted), torch.autograd.grad(expected * 0.3, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_logprobs_and_gradients_are_the_formulas(small_chunks):
    x, weight, labels, weights = drawn(23, 17, 6)
    got, g = token_logprobs(x, weight, labels), weights.double()
    expected = (x @ weight.T).log_softmax(-1)[torch.arange(23), labels]
    torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT)
    for a, b in zip(torch.autograd.grad(got, (x, weight), g), torch.autograd.grad(expected, (x, weight), g),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_hopeless_labels_have_a_finite_loss():
    """Where exp(-nll) is no float32 number: 1000 nats, with the gradient that goes with them."""
    x, weight = torch.tensor([[1000.0], [1000.0]], requires_grad=True), torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 1]), torch.ones(2))
    assert loss.item() == 1000.0
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert dx.tolist() == [[0.0], [1.0]] and dweight.tolist() == [[1000.0], [-1000.0]]
    assert token_logprobs(x, weight, torch.tensor([0, 1])).tolist() == [0.0, -1000.0]


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_each_tokens_loss_is_float64s_at_a_large_vocabulary(size):
    """Of the same float32 logits (a product with ones and zeros makes no others), at Qwen3's vocabulary. A float32 of 8
    to 16 nats is off by up to 4.8e-7; float32 sums along a row, which torch's softmax takes, by ten times that."""
    T, V = 12, 151936
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(T, V, generator=g) * size, torch.randint(V, (T,), generator=g)
    labels = torch.where(torch.arange(T) % 2 == 0, labels, logits.argmax(-1))
    want = F.cross_entropy(logits.double(), labels, reduction="none")
    x, weight = torch.eye(T).requires_grad_(), logits.T.contiguous().requires_grad_()
    got = -token_logprobs(x, weight, labels)
    for i in range(T):
        alone = linear_cross_entropy(x, weight, labels, F.one_hot(torch.tensor(i), T).float())
        assert abs(alone.item() - want[i].item()) <= 1e-6, i
        assert abs(got[i].item() - want[i].item()) <= 1e-6, i
    weights = torch.rand(T, generator=g)
    _, dweight = torch.autograd.grad(linear_cross_entropy(x, weight, labels, weights), (x, weight))
    terms = (logits.double().softmax(-1) * weights[:, None]).T                 # in which gradients are relatively exact
    hot, eps = F.one_hot(labels, V).T, torch.finfo(torch.float32).eps
    below_TV = (logits.amax(1, keepdim=True) - logits).double()                # rounded, and then exponentiated
    off = (dweight.double() + hot * weights - terms).abs()
    assert (off <= eps * ((below_TV.T / 2 + 4) * terms + 2 * hot)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [True, False])
def test_narrow_dtypes_lose_no_more_than_their_products(monkeypatch, small_chunks, dtype, fast):
    """With products in the dtype logits are rounded to it, and so are probabilities before they meet x and weight; else
    in float32."""
    wide = dtype if fast else torch.float32
    monkeypatch.setattr(cross_entropy, "product_dtype", lambda *_: wide)
    x, weight, labels, weights = drawn(30, 50, 16, dtype)
    weights = (weights > 0).float()
    loss = linear_cross_entropy(x, weight, labels, weights)
    assert loss.dtype == torch.float32
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected, logits = formula(x64, weight64, labels, weights), (x64 @ weight64.T).detach()
    unit, accumulated = torch.finfo(wide).eps, 100 * torch.finfo(torch.float32).eps
    moved = unit / 2 * logits.abs().max() + accumulated * 10                     # of a logit
    assert abs(loss.item() - expected.item()) <= 2 * moved * weights.sum() + accumulated * expected.item()
    p, hot = logits.softmax(-1), F.one_hot(labels, 50).double()
    terms = (p + hot) * weights[:, None]
    # of a term: its logits moved, two roundings and the result's
    part = (2 * moved).exp() - 1 + unit + torch.finfo(dtype).eps
    for got, want, size in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(expected, (x64, weight64)),
                               (terms @ weight64.abs(), terms.T @ x64.abs()), strict=True):
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= part * size).all()


@pytest.mark.parametrize("masked", [0, 10, 24])
def test_flops_are_three_products_of_the_tokens_that_count(masked):
    x, weight, labels, _ = drawn(24, 50, 8)
    weights = (torch.arange(24) >= masked).float()
    product = 2 * (24 - masked) * 50 * 8
    loss_of = {"all": lambda: linear_cross_entropy(x, weight, labels, weights).backward(),
               "evaluation": torch.no_grad()(lambda: linear_cross_entropy(x, weight, labels, weights)),
               "frozen": lambda: linear_cross_entropy(x, weight.detach(), labels, weights).backward(),
               "logprobs": lambda: (token_logprobs(x, weight, labels) * weights).sum().backward()}
    whole = 2 * 24 * 50 * 8
    for kind, expected in {"all": 3 * product, "evaluation": product, "frozen": 2 * product,
                           "logprobs": whole + 3 * product}.items():
        with FlopCounterMode(display=False) as counter:
            loss_of[kind]()
        assert counter.get_total_flops() == expected, kind


def test_the_counted_products_are_those_that_run(monkeypatch, small_chunks):
    """The formula of the operator against the products that its insides call, and no chunk larger than asked for."""
    calls = []

    def counting(real):
        def product(*args, out):
            calls.append((*args[-2].shape, args[-1].shape[1]))
            return real(*args, out=out)
        return product

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counting(getattr(torch, name)))
    x, weight, labels, weights = drawn(24, 50, 8)
    linear_cross_entropy(x, weight, labels, weights)
    assert sum(2 * m * k * n for m, k, n in calls) == 3 * 2 * int(weights.count_nonzero()) * 50 * 8
    assert len(calls) > 6 and all({50, 8} < {*call} and min(call) <= 5 for call in calls)


def test_no_token_at_all():
    x, weight, labels, _ = drawn(3, 5, 2)
    loss = linear_cross_entropy(x, weight, labels, torch.zeros(3))
    assert loss.item() == 0
    assert [g.abs().sum().item() for g in torch.autograd.grad(loss, (x, weight))] == [0, 0]
    assert token_logprobs(x[:0], weight, labels[:0]).shape == (0,)


def test_backward_twice():
    x, weight, labels, weights = drawn(6, 5, 4)
    loss = linear_cross_entropy(x, weight, labels, weights)
    first = torch.autograd.grad(loss * 2, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, 2 * b)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, (x, weight))


def test_under_torch_func():
    """Per-token gradients by vmap of grad, and a directional derivative."""
    x, weight, labels, weights = (t.detach() for t in drawn(5, 7, 4))
    one = lambda x, weight, label, w: linear_cross_entropy(x[None], weight, label[None], w[None], z_loss=0.1)
    each = torch.func.vmap(torch.func.grad(one, argnums=(0, 1)), in_dims=(0, None, 0, 0))
    dx, dweight = each(x, weight, labels, weights)
    x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, labels, weights, z_loss=0.1), (x, weight))
    for a, b in zip((dx, dweight.sum(0)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    _, along = torch.func.jvp(lambda w: token_logprobs(x.detach(), w, labels).sum(), (weight.detach(),),
                              (torch.ones_like(weight),))
    gradient, = torch.autograd.grad(token_logprobs(x, weight, labels).sum(), weight)
    torch.testing.assert_close(along, gradient.sum(), rtol=EXACT, atol=EXACT)


def test_the_operators_are_well_formed():
    x, weight, labels, weights = drawn(6, 5, 4)
    torch.library.opcheck(torch.ops.xtf.linear_cross_entropy, (x, weight, labels, weights, 0.1, True, True))
    torch.library.opcheck(torch.ops.xtf.linear_cross_entropy, (x, weight.detach(), labels, weights, 0.0, True, False))
    torch.library.opcheck(torch.ops.xtf.token_logprobs, (x, weight, labels))


def test_compiles_whole_and_is_the_same():
    x, weight, labels, weights = drawn(6, 5, 4)
    for fn in (lambda x, weight: linear_cross_entropy(x, weight, labels, weights, z_loss=0.1),
               lambda x, weight: token_logprobs(x, weight, labels).sum()):
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        got, expected = (torch.autograd.grad(f(x, weight) * 3, (x, weight)) for f in (compiled, fn))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_errors_say_what_does_not_fit():
    x, weight, labels, weights = drawn(6, 5, 4)
    with pytest.raises(ValueError, match="flatten"):
        linear_cross_entropy(x[None], weight, labels[None], weights[None])
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(x, weight[:, :3], labels)
    with pytest.raises(ValueError, match="token_logprobs differentiates"):
        linear_cross_entropy(x, weight, labels, weights.requires_grad_())
    with pytest.raises(ValueError, match="labels' shape"):
        linear_cross_entropy(x, weight, labels, weights.detach()[:3])


def test_the_reference_is_the_formula():
    args = drawn(9, 6, 4)
    torch.testing.assert_close(reference(*args, z_loss=0.2), formula(*args, z_loss=0.2), rtol=EXACT, atol=EXACT)
