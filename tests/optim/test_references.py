"""Each optimizer over 200 steps against a written-out float64 reference, and against torch.optim where it has one."""
import math

import pytest
import torch

from xtf import tree
from xtf.ops import LOCAL
from xtf.optim import adamw, apply_updates, lion, muon, orthogonalise, partition, sgd

STEPS, LR = 200, 1e-2
SHAPES = {"tall": (9, 4), "wide": (3, 8), "square": (5, 5)}


def draw(seed):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=g, dtype=torch.float64) for k, shape in SHAPES.items()}


def curvature(p):
    """The gradient of a loss that is not quadratic, so that rounding feeds back: of Σ cosh(p - 1/2) + sin(3 p)."""
    return torch.sinh(p - 0.5) + 3 * torch.cos(3 * p)


def ours(tx, steps=STEPS, dtype=torch.float64):
    params = tree.tree_map(lambda x: x.to(dtype).requires_grad_(), draw(0))
    state = tx.init(params)
    for t in range(steps):
        noise = draw(t + 1)
        updates, state = tx.update({k: (curvature(p.detach().double()) + noise[k]).to(dtype)
                                    for k, p in params.items()}, state, params)
        params = apply_updates(params, updates)
    return {k: p.detach() for k, p in params.items()}


def written_out(rule, steps=STEPS):
    """`rule(p, g, memory, t) -> p` in plain float64."""
    params, memory = draw(0), {k: {} for k in SHAPES}
    for t in range(1, steps + 1):
        noise = draw(t)
        params = {k: rule(p, curvature(p) + noise[k], memory[k], t) for k, p in params.items()}
    return params


def adam_rule(p, g, s, t, b1=0.9, b2=0.95, decay=0.1):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return p - LR * (s["m"] / (1 - b1**t) / ((s["v"] / (1 - b2**t)) ** 0.5 + 1e-8) + decay * p)


def sgd_rule(p, g, s, t, momentum=0.9, decay=0.1):
    g = g + decay * p
    s["m"] = momentum * s.get("m", 0) + g
    return p - LR * (g + momentum * s["m"])


def lion_rule(p, g, s, t, b1=0.9, b2=0.99, decay=0.3):
    m = s.get("m", torch.zeros_like(g))
    s["m"] = b2 * m + (1 - b2) * g
    return p - LR * (torch.sign(b1 * m + (1 - b1) * g) + decay * p)


def quintic(u, steps=5):
    """Newton-Schulz on singular values: U f(S) V'."""
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    values = values / torch.linalg.vector_norm(u)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def muon_rule(p, g, s, t, momentum=0.95, decay=0.1, nesterov=True, adjust="match_rms_adamw"):
    s["m"] = momentum * s.get("m", 0) + (1 - momentum) * g
    u = momentum * s["m"] + (1 - momentum) * g if nesterov else s["m"]
    scale = 0.2 * math.sqrt(max(p.shape)) if adjust == "match_rms_adamw" else math.sqrt(max(1, p.shape[0] / p.shape[1]))
    return p - LR * (scale * quintic(u) + decay * p)


REFERENCES = {
    "adamw": (adamw(LR), adam_rule), "sgd": (sgd(LR, momentum=0.9, nesterov=True, weight_decay=0.1), sgd_rule),
    "lion": (lion(LR, weight_decay=0.3), lion_rule), "muon": (muon(LR, dtype=None), muon_rule),
    "muon, original": (muon(LR, adjust="original", nesterov=False,
                            dtype=None), lambda *a: muon_rule(*a, nesterov=False, adjust="original"))}


@pytest.mark.parametrize("tx, rule", REFERENCES.values(), ids=REFERENCES)
def test_200_steps_of_the_formula(tx, rule):
    want = written_out(rule)
    for k, p in ours(tx).items():
        assert (p - draw(0)[k]).abs().max() > 0.1                             # it went somewhere
        torch.testing.assert_close(p, want[k], rtol=0, atol=1e-10)


def test_another_constant_is_seen():
    almost = muon(LR, momentum=0.951, dtype=None)
    for tx, rule in ((adamw(LR, b2=0.951), adam_rule), (lion(LR, b2=0.991, weight_decay=0.3), lion_rule),
                     (almost, muon_rule)):
        want = written_out(rule)
        assert max((p - want[k]).abs().max() for k, p in ours(tx).items()) > 1e-6


def torchs(make):
    params = {k: x.requires_grad_() for k, x in draw(0).items()}
    optimizer = make(list(params.values()))
    for t in range(STEPS):
        noise = draw(t + 1)
        for k, p in params.items():
            p.grad = curvature(p.detach()) + noise[k]
        optimizer.step()
    return {k: p.detach() for k, p in params.items()}


@pytest.mark.parametrize("momentum, nesterov, decay",
                         [(0.0, False, 0.0), (0.0, False, 0.1), (0.9, False, 0.1), (0.9, True, 0.1)])
def test_sgd_is_torchs(momentum, nesterov, decay):
    want = torchs(lambda ps: torch.optim.SGD(ps, lr=LR, momentum=momentum, nesterov=nesterov, weight_decay=decay))
    for k, p in ours(sgd(LR, momentum, nesterov, decay)).items():
        torch.testing.assert_close(p, want[k], rtol=0, atol=1e-11)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(adjust, nesterov, monkeypatch):
    """Theirs makes matrices orthogonal in bf16; here in float64, so that equal means equal."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    want = torchs(lambda ps: torch.optim.Muon(ps, lr=LR, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust))
    for k, p in ours(muon(LR, nesterov=nesterov, adjust=adjust, dtype=None)).items():
        torch.testing.assert_close(p, want[k], rtol=0, atol=1e-10)


def test_muon_in_bf16_is_near():
    """One step. Its 15 products round by 2^-9 each, and what comes in too; singular values of these matrices, over
    their 2-norm, are above 0.1, where the quintics together have a slope below 10."""
    whole, short = (ours(muon(LR, dtype=dtype), steps=1) for dtype in (None, torch.bfloat16))
    for k in SHAPES:
        assert 0 < (whole[k] - short[k]).abs().max() < 16 * 2**-9 * 10 * LR * 0.2 * math.sqrt(max(SHAPES[k]))


@pytest.mark.parametrize("shape", [(4, 64, 32), (3, 32, 64), (1, 32, 32), (2, 1, 7), (0, 4, 4)])
def test_orthogonalise(shape):
    """Singular values come near 1, directions stay, each matrix of a stack for itself, whatever its scale."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = orthogonalise(x)
    if shape[1] != shape[2]:                                                  # a square one has singular values near 0
        values = torch.linalg.svdvals(y)
        assert ((values > 0.65) & (values < 1.25)).all()
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(b, quintic(a), rtol=0, atol=1e-11)
        torch.testing.assert_close(orthogonalise(1e-3 * a[None])[0], b, rtol=0, atol=1e-11)
    zero = orthogonalise(torch.zeros(shape))
    assert torch.equal(zero, torch.zeros(shape))


def test_stacked_experts_are_each_for_itself():
    g = torch.Generator().manual_seed(0)
    stack, grad = torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64)
    tx = muon(LR, dtype=None)
    apart = {str(i): stack[i].clone().requires_grad_() for i in range(3)}
    together = {"w": stack.clone().requires_grad_()}
    one, _ = tx.update({"w": grad.clone()}, tx.init(together), together)
    three, _ = tx.update({str(i): grad[i].clone() for i in range(3)}, tx.init(apart), apart)
    torch.testing.assert_close(one["w"], torch.stack(list(three.values())), rtol=0, atol=1e-14)


def test_partition_is_its_parts():
    names = {"tall": "fast", "wide": "slow", "square": "muon"}
    together = ours(partition({"fast": adamw(3 * LR), "slow": adamw(LR, mask=lambda path, p: path != "wide"),
                               "muon": muon(LR, dtype=None)},
                              lambda path, p: names[path]))
    apart = {"tall": ours(adamw(3 * LR)), "wide": ours(adamw(LR, weight_decay=0.0)),
             "square": ours(muon(LR, dtype=None))}
    for k in SHAPES:
        assert torch.equal(together[k], apart[k][k])


def test_errors_name_the_leaf():
    params = {"layers": [{"norm": torch.ones(3, requires_grad=True), "w": torch.ones(2, 2)}]}
    with pytest.raises(ValueError,
                       match=r"muon: layers\.0\.norm of shape \(3,\) is no matrix; give it to another optimizer with "
                             r"`partition`"):
        muon(LR).init(params)
    with pytest.raises(ValueError,
                       match=r"partition: layers\.0\.norm is labelled 'vector', but there are optimizers for 'sgd', "
                             r"'muon'"):
        partition({"sgd": sgd(LR), "muon": muon(LR)}, lambda path, p: "vector").init(params)
    with pytest.raises(ValueError, match='adjust must be "match_rms_adamw" or "original"'):
        muon(LR, adjust="none")
    for tx, name in ((sgd(LR, momentum=0.9), "sgd"), (lion(LR), "lion"), (muon(LR), "muon")):
        matrices = {"w": torch.ones(2, 2, requires_grad=True), "frozen": torch.ones(2, 2)}
        state = tx.init(matrices)
        with pytest.raises(ValueError, match=rf"{name}: frozen .* its moments are None"):
            tx.update({"w": torch.ones(2, 2), "frozen": torch.ones(2, 2)}, state, matrices, LOCAL)
        with pytest.raises(ValueError,
                           match=rf"{name}: w has a gradient of shape \(2,\), but its parameter has \(2, 2\)"):
            tx.update({"w": torch.ones(2), "frozen": None}, state, matrices, LOCAL)
