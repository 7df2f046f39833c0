"""attend against plain loops, transformers' masks and sinks, and its own reference in float64; gradients too."""
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import xtf
from xtf import tree
from xtf.data.batch import Sample, pack_rows, stack
from xtf.kernels import attention
from xtf.kernels.attention import attend, attention_pairs, reference_attend, visible

EXACT = 1e-12                       # float64, sums of at most 300 terms of size 1


def segments_of(*packs, T=None):
    """[P, S + 1] int32 from lists of document lengths."""
    ends = [torch.tensor([0, *lengths]).cumsum(0).tolist() for lengths in packs]
    width = max(map(len, ends))
    return torch.tensor([e + [e[-1]] * (width - len(e)) for e in ends], dtype=torch.int32)


def tensors(P, T, H, K, d, dtype=torch.float64, seed=0, sinks=False, e=None):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return [draw(P, T, H, d), draw(P, T, K, d), draw(P, T, K, e or d), *([draw(H)] if sinks else [])]


def out_and_gradients(fn, inputs, **options):
    q, k, v, *sinks = inputs
    o = fn(q, k, v, sinks=sinks[0] if sinks else None, **options)
    g = torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, inputs, g)]


def assert_close(got, expected, tolerance=EXACT):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype or tolerance > EXACT
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 2, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_reference_is_the_formula(window, sinks):
    """Query by query, key by key, in Python."""
    q, k, v, *s = (x.detach() for x in tensors(2, 7, 4, 2, 3, sinks=sinks))
    lengths = [3, 4], [1, 5, 1]
    o = reference_attend(q, k, v, segments=segments_of(*lengths), window=window, scale=0.7, sinks=s[0] if s else None)
    for p, pack in enumerate(lengths):
        start = 0
        for n in pack:
            for i in range(start, start + n):
                seen = [j for j in range(start, i + 1) if window is None or i - j < window]
                for h in range(4):
                    scores = [0.7 * float(q[p, i, h] @ k[p, j, h // 2]) for j in seen]
                    total = sum(map(math.exp, scores)) + (math.exp(float(s[0][h])) if s else 0)
                    expected = sum(math.exp(x) / total * v[p, j, h // 2] for x, j in zip(scores, seen, strict=True))
                    torch.testing.assert_close(o[p, i, h], expected, rtol=EXACT, atol=EXACT)
            start += n


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_is_transformers_sliding_window(window):
    at = torch.arange(8)
    expected = sliding_window_causal_mask_function(window)(0, 0, at[:, None], at[None, :])
    assert torch.equal(visible(segments_of([8]), 8, window)[0], expected)


def test_sinks_are_those_of_gpt_oss():
    inputs = tensors(1, 9, 4, 2, 8, sinks=True)
    q, k, v, sinks = inputs

    class Module:
        num_key_value_groups, training = 2, False
    Module.sinks = sinks
    mask = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~visible(segments_of([9]), 9)[0],
                                                              torch.finfo(torch.float64).min)[None, None]
    theirs, _ = eager_attention_forward(Module(), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
                                        scaling=8 ** -0.5)
    ours = attend(q, k, v, segments=segments_of([9]), sinks=sinks)
    assert_close([ours], [theirs])
    g = torch.randn_like(ours)
    assert_close(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g))


@st.composite
def cases(draw):
    T = draw(st.integers(1, 150))
    P, K, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    packs = []
    for _ in range(P):
        cuts = sorted({*draw(st.lists(st.integers(1, T), max_size=6)), T})
        packs.append([b - a for a, b in pairwise([0, *cuts])])
    window = draw(st.none() | st.integers(1, T + 1))
    d, sinks = draw(st.sampled_from([1, 5, 8])), draw(st.booleans())
    small, kept = draw(st.sampled_from([0, 2 ** 22])), draw(st.sampled_from([0, 4]))
    return packs, T, K * G, K, d, draw(st.sampled_from([d, 1, 3, 8])), window, sinks, small, kept


@given(cases())
def test_attend_is_its_reference(case):
    """Both ways through the CPU, probabilities kept or not, small blocks so that documents span several."""
    packs, T, H, K, d, e, window, sinks, small, kept = case
    inputs, segments = tensors(len(packs), T, H, K, d, sinks=sinks, e=e), segments_of(*packs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", 16)
        patch.setattr(attention, "SMALL", small)
        patch.setattr(attention, "KEPT_KEYS", kept)
        got = out_and_gradients(attend, inputs, segments=segments, window=window)
        with torch.no_grad():
            alone = attend(*inputs[:3], segments=segments, window=window, sinks=inputs[3] if sinks else None)
    expected = out_and_gradients(reference_attend, inputs, segments=segments, window=window)
    assert_close(got, expected)
    assert_close([alone], expected[:1])


@pytest.mark.parametrize("small", [0, 2 ** 22])
def test_packing_is_invisible(monkeypatch, small):
    monkeypatch.setattr(attention, "SMALL", small)
    q, k, v = (x.detach() for x in tensors(1, 230, 4, 2, 8))
    packed, start = attend(q, k, v, segments=segments_of([100, 3, 127])), 0
    for n in (100, 3, 127):
        at = slice(start, start + n)
        assert_close([attend(q[:, at], k[:, at], v[:, at], segments=segments_of([n]))], [packed[:, at]])
        start += n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [0, 2 ** 22])
def test_narrow_dtypes_lose_no_more_than_their_rounding(monkeypatch, dtype, small):
    """Blocks compute in float32 whatever comes in, and round once: half a unit in the last place, plus float32's own
    error.

    Torch's masked attention, for small calls, also rounds the probabilities (and their gradients) to the dtype: a few
    more units of the largest term, and sums of up to 70 of them.
    """
    monkeypatch.setattr(attention, "SMALL", small)
    inputs, segments = tensors(1, 120, 4, 2, 16, dtype), segments_of([50, 70])
    got = out_and_gradients(attend, inputs, segments=segments, window=40)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    o = reference_attend(*wide, segments=segments, window=40)
    g = torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype).double()
    unit = torch.finfo(dtype).eps
    float32_error = 120 * torch.finfo(torch.float32).eps * 10  # sums of at most 120 terms no larger than 10
    for a, b in zip(got, [o, *torch.autograd.grad(o, wide, g)], strict=True):
        assert a.dtype == dtype
        bound = unit / 2 * b.abs() + float32_error + (0 if small == 0 else unit * 70 ** 0.5 * b.abs().max())
        assert ((a.double() - b).abs() <= bound).all()


def test_any_strides_will_do(monkeypatch):
    """q, k, v cut from one product's output, and heads before positions."""
    monkeypatch.setattr(attention, "SMALL", 0)
    qkv = torch.randn(2, 90, 8 * 8, dtype=torch.float64).unflatten(-1, (8, 8))
    heads_first = torch.randn(2, 4, 90, 8, dtype=torch.float64).transpose(1, 2)
    segments = segments_of([90], [20, 70])
    for inputs in ([qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]],
                   [heads_first, qkv[:, :, 4:6], heads_first[:, :, ::2]]):
        inputs = [x.detach().requires_grad_() for x in inputs]
        assert_close(out_and_gradients(attend, inputs, segments=segments),
                     out_and_gradients(reference_attend, inputs, segments=segments))


def test_segments_changed_in_place_are_read_again():
    q, k, v = (x.detach() for x in tensors(1, 70, 2, 2, 4))
    segments = segments_of([30, 40])
    attend(q, k, v, segments=segments)
    segments.copy_(segments_of([50, 20]))
    assert_close([attend(q, k, v, segments=segments)], [reference_attend(q, k, v, segments=segments)])


def test_under_torch_func():
    """vmap over packs, per-example gradients, jvp."""
    q, k, v = (x.detach() for x in tensors(3, 6, 4, 2, 5))
    segments = segments_of([6], [2, 4], [1, 1, 4])
    alone = lambda q, k, v, segments: attend(q[None], k[None], v[None], segments=segments[None], window=3)[0]
    expected = attend(q, k, v, segments=segments, window=3)
    assert_close([torch.func.vmap(alone)(q, k, v, segments)], [expected])
    square = lambda *a: alone(*a).square().sum()
    got = torch.func.vmap(torch.func.grad(square, argnums=(0, 1, 2)))(q, k, v, segments)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert_close(got, torch.autograd.grad(attend(*leaves, segments=segments, window=3).square().sum(), leaves))
    tangent = torch.randn_like(q)
    _, along = torch.func.jvp(lambda q: square(q, k[0], v[0], segments[0]), (q[0],), (tangent[0],))
    torch.testing.assert_close(along, (got[0][0] * tangent[0]).sum(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("window", [None, 10])
def test_flops_are_those_of_the_visible_pairs(window):
    """4 d a pair forward, 10 d backward (probabilities are computed again), the same whether packs are counted together
    or alone."""
    segments = segments_of([30, 40], [70])
    inputs = tensors(2, 70, 4, 2, 8)
    count = lambda P: sum(int(visible(segments[p:p + 1], 70, window).sum()) for p in P)

    def counted(P):
        q, k, v = (x[P] for x in inputs)
        with FlopCounterMode(display=False) as forward:
            o = attend(q, k, v, segments=segments[P], window=window)
        with FlopCounterMode(display=False) as backward:
            o.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    assert counted([0, 1]) == (4 * 8 * 4 * count([0, 1]), 10 * 8 * 4 * count([0, 1]))
    assert [a + b for a, b in zip(counted([0]), counted([1]), strict=True)] == list(counted([0, 1]))
    assert attention_pairs(segments, 70, window) == count([0, 1])


@pytest.mark.parametrize("sinks", [False, True])
def test_the_operator_is_well_formed(sinks):
    q, k, v, *s = tensors(2, 20, 4, 2, 4, sinks=sinks)
    segments = segments_of([20], [5, 15])
    torch.library.opcheck(torch.ops.xtf.attend, (q, k, v, s[0] if s else None, segments, 7, 0.5))
    q, k, v, *s = (x.detach() for x in (q, k, v, *s))
    torch.library.opcheck(torch.ops.xtf.attend_backward, (q, q, k, v, s[0] if s else None, segments, 7, 0.5))


def test_compiles_whole_and_is_the_same():
    inputs, segments = tensors(1, 40, 4, 2, 8, torch.float32), segments_of([15, 25])
    eager = out_and_gradients(attend, inputs, segments=segments, window=9)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_close(out_and_gradients(compiled, inputs, segments=segments, window=9), eager, 1e-5)


def test_checkpoint_drops_what_is_kept(monkeypatch):
    """Probabilities are saved where autograd's hooks see them, so remat frees them and its gradients are the same."""
    monkeypatch.setattr(attention, "SMALL", 0)
    inputs, segments, sizes = tensors(1, 64, 2, 2, 64), segments_of([64]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        expected = out_and_gradients(attend, inputs, segments=segments)
    assert sum(sizes) == sum(x.numel() for x in inputs) + 2 * 64 * 64
    again = lambda *a, **k: checkpoint(attend, *a, use_reentrant=False, **k)
    assert_close(out_and_gradients(again, inputs, segments=segments), expected)


def flash_on_cpu(calls):
    """Stand-ins for the two CUDA kernels, on torch's flash kernel for CPUs: like CUDA's they take outputs and
    logsumexps, know no sinks, and share a key-value head among a group of query heads."""
    heads = lambda x, at, H: x[at].transpose(0, 1).repeat_interleave(H // x.shape[1], 0).unsqueeze(0)
    back = lambda x, K: x.squeeze(0).unflatten(0, (K, -1)).sum(1).transpose(0, 1)

    def parts(q, k, ends, longest, options):
        assert ends.dtype == torch.int32 and longest >= int(ends.diff().max()) and ends[-1] == len(q)
        left = options.get("window_size_left")
        assert options["is_causal"] == (left is None) and options.get("window_size_right", 0) == 0
        calls.append((len(ends) - 1, longest, left, k.shape[1]))
        for a, b in pairwise(ends.tolist()):
            if b > a:
                seen = visible(segments_of([b - a]), b - a, None if left is None else left + 1)[0]
                yield slice(a, b), {"attn_mask": torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf),
                                    "scale": options["scale"]}

    def forward(q, k, v, ends, longest, options):
        H = q.shape[1]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        pieces = [kernel(*(heads(x, at, H) for x in (q, k, v)), **how)
                  for at, how in parts(q, k, ends, longest, options)]
        lse = torch.cat([lse[0].float() for _, lse in pieces], 1)
        return torch.cat([back(o, H) for o, _ in pieces]), lse, "seed", "unused"

    def backward(g, q, k, v, o, lse, ends, longest, options, state):
        assert state == ["seed", "unused"] and lse.dtype == torch.float32
        lse, H = lse.to(torch.promote_types(q.dtype, torch.float32)), q.shape[1]
        pieces = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(heads(x, at, H) for x in (g, q, k, v, o)), lse[None, :, at], 0.0, False, **how)
                  for at, how in parts(q, k, ends, longest, options)]
        return tuple(torch.cat([back(x, n) for x in gradients])
                     for gradients, n in zip(zip(*pieces, strict=True), (H, k.shape[1], k.shape[1]), strict=True))
    return forward, backward


@pytest.fixture
def flash_calls(monkeypatch):
    """What the CUDA path asks of its kernels: (documents, longest, keys before the query, key-value heads) a call."""
    calls = []
    forward, backward = flash_on_cpu(calls)
    monkeypatch.setattr(attention, "FLASH", True)
    monkeypatch.setattr(attention, "_flash", forward)
    monkeypatch.setattr(attention, "_flash_backward", backward)
    return calls


def through_cuda(q, k, v, segments, window=None, scale=None, sinks=None):
    return attention._attend_cuda(q, k, v, segments, window, q.shape[-1] ** -0.5 if scale is None else scale, sinks)


@pytest.mark.parametrize("window, scale", [(None, None), (1, 0.5), (4, 0.5)])
def test_cuda_flattens_packs_into_one_list_of_documents(flash_calls, window, scale):
    """Grouped heads go to the kernel as they are, and their gradients come back so."""
    inputs, segments = tensors(2, 12, 4, 2, 8, torch.bfloat16), segments_of([5, 7], [2, 1, 9])
    got = out_and_gradients(through_cuda, inputs, segments=segments, window=window, scale=scale)
    expected = out_and_gradients(reference_attend, inputs, segments=segments, window=window, scale=scale)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= 2 ** -6 * max(1, b.double().abs().max())
    assert flash_calls == [(6, 12, None if window is None else window - 1, 2)] * 2


def test_cuda_pads_narrow_values_and_leaves_float64_to_the_mask(flash_calls):
    q, k, v = (x.detach() for x in tensors(2, 12, 4, 2, 8, torch.bfloat16))
    segments = segments_of([5, 7], [2, 1, 9])
    got = through_cuda(q, k, v[..., :4], segments)                   # MLA's
    torch.testing.assert_close(got, reference_attend(q, k, v[..., :4], segments=segments), rtol=2 ** -7, atol=2 ** -7)
    assert len(flash_calls) == 1
    wide = [x.double() for x in (q, k, v)]
    assert_close([through_cuda(*wide, segments, 4, 0.5)],
                 [reference_attend(*wide, segments=segments, window=4, scale=0.5)])
    assert len(flash_calls) == 1


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-6), (torch.bfloat16, 2 ** -6)])
def test_cuda_sinks_by_a_kernel_without_sinks(flash_calls, window, dtype, bound):
    """Logsumexps pass through float32, so float64 agrees to that."""
    inputs, segments = tensors(2, 12, 4, 2, 8, dtype, sinks=True), segments_of([5, 7], [2, 1, 9])

    def through(q, k, v, segments, window, sinks):
        if dtype == torch.bfloat16:
            return through_cuda(q, k, v, segments, window, sinks=sinks)
        ends = torch.tensor([0, 5, 12, 14, 15, 24], dtype=torch.int32)
        return attention._Flash.apply(*(x.flatten(0, 1) for x in (q, k, v)), sinks, ends, 12, window,
                                      8 ** -0.5).view_as(q)

    got = out_and_gradients(through, inputs, segments=segments, window=window)
    expected = out_and_gradients(reference_attend, inputs, segments=segments, window=window)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        assert (a.double() - b.double()).abs().max() <= bound * max(1, b.double().abs().max())


class Recorded(TorchDispatchMode):
    """The arguments by name of torch's own flash operators, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.startswith("aten::_flash_attention"):
            names = [a.name for a in func._schema.arguments]
            self.calls.append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_cuda_calls_operators_of_torch_with_these_arguments(window, sinks):
    """Shapes and dtypes through the real operators, without data. Without a window none is given: torch 2.11's adapter
    to FlashAttention 4 refuses to go backward at any number, that of no window too."""
    inputs = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
              for shape in ((2, 12, 4, 64), (2, 12, 2, 64), (2, 12, 2, 64), (4,))]
    inputs = inputs if sinks else inputs[:3]
    with Recorded() as seen:
        o = attend(*inputs[:3], segments=torch.zeros(2, 4, dtype=torch.int32, device="meta"), window=window,
                   sinks=inputs[3] if sinks else None)
        assert o.shape == inputs[0].shape and o.dtype == torch.bfloat16
        gradients = torch.autograd.grad(o.sum(), inputs)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in inputs]
    assert len(seen.calls) == 2
    for call in seen.calls:
        assert call["key"].shape == call["value"].shape == (24, 2, 64)
        assert call["max_q"] == call["max_k"] == 12
        windows = call.get("window_size_left"), call.get("window_size_right")
        assert windows == ((None, None) if window is None else (4, 0))


# dynamo makes an instance of each autograd function that it traces
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_cuda_is_told_how_long_documents_are():
    """Through slices for micro-batches, moves and torch.compile, which compiles each bound once and knows it again."""
    packs = [pack_rows([[Sample([1] * n, [1] * n) for n in lengths]], 64, 21) for lengths in ([3] * 20, [20, 20], [9])]
    assert [one.longest for one in packs] == [4, 32, 64]             # the last one's padding is a document too
    assert stack(packs[:2]).segments.longest == 32
    assert stack([replace(packs[0], longest=None), packs[1]]).longest is None

    compiled = []

    def note(graph, inputs):
        compiled.extend(node.args[5] for node in graph.graph.nodes if "_flash_attention_forward" in str(node.target))
        return make_boxed_func(graph.forward)

    jitted = torch.compile(attend, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=note))
    for longest in (32, 64, 32):
        n = longest // 2 + 1
        given = tree.tree_map(lambda x: x.to("meta"), pack_rows([[Sample([1] * n, [1] * n)] * (64 // n)] * 2, 64, 16))
        seen = []

        def share(p, batch, ops, seen=seen):
            q = (p["w"] * batch.input_ids[..., None, None]).expand(-1, -1, 2, 64).bfloat16()
            with Recorded() as calls:
                out = ops.attend(q, q, q, segments=batch.segments).sum()
            seen.extend((call["max_q"], len(call["cum_seq_q"])) for call in calls.calls)
            return (out + jitted(q, q, q, segments=batch.segments).sum()).float()
        params = {"w": torch.ones(1, device="meta", requires_grad=True)}
        xtf.microbatch(xtf.value_and_grad(share), 2)(params, given)
        assert seen == [(longest, 17)] * 2
    assert compiled == [32, 64]


def test_segments_longer_than_their_batch_says_are_refused():
    batch = pack_rows([[Sample([1] * 5, [1] * 5)] * 12], 60, 16)
    assert batch.longest == batch.segments.longest == 8
    with pytest.raises(ValueError, match="10 positions, but longest is 8"):
        replace(batch, segments=batch.segments[:, ::2])


def test_errors_say_what_does_not_fit():
    q, k, v = tensors(1, 4, 4, 2, 4)
    segments = segments_of([4])
    for options in ({"window": 0}, {"sinks": torch.zeros(3)}, {"segments": segments_of([4], [4])}):
        with pytest.raises(ValueError, match=next(iter(options))):
            attend(q, k, v, **({"segments": segments} | options))
    with pytest.raises(ValueError, match="K divide H"):
        attend(q[:, :, :3], k, v, segments=segments)
    with pytest.raises(ValueError, match="do not fit"):
        attend(q, k, v[:, :3], segments=segments)
