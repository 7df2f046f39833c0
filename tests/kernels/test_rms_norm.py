"""rms_norm against transformers' module and the formula in float64; its Triton kernels in the interpreter and compiled
for sm_90."""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import triton
import triton.backends.nvidia
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xtf.kernels import rms_norm as kernel
from xtf.kernels.rms_norm import rms_norm

EXACT = 1e-12


@pytest.fixture(autouse=True)
def no_call_is_small(monkeypatch):
    """These tests are small, and are meant for the kernels; the reference, to which small calls go, is tested by
    name."""
    monkeypatch.setattr(kernel, "SMALL", 0)


def drawn(*shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
                 for s in (shape, shape[-1:]))
    return x, weight, torch.randn(shape, dtype=torch.float64, generator=g).to(dtype)


def formula(x, weight, eps):
    return x / (x ** 2).mean(-1, keepdim=True).add(eps).sqrt() * weight


def out_and_gradients(fn, x, weight, g):
    y = fn(x, weight, 1e-3)
    return y.detach(), *torch.autograd.grad(y, (x, weight), g)


@pytest.mark.parametrize("fn", [rms_norm, kernel.reference_rms_norm, lambda *args: torch.ops.xtf.rms_norm(*args)[0]])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 4, 8), (0, 4)])
def test_values_and_gradients_are_the_formulas(fn, shape):
    args = drawn(*shape)
    for a, b in zip(out_and_gradients(fn, *args), out_and_gradients(formula, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_transformers_module(dtype):
    """In half precision bit for bit but for float32's last digit before the roundings: at most one unit of the
    result."""
    x, weight, g = drawn(6, 32, dtype=dtype)
    module = LlamaRMSNorm(32, eps=1e-3).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    y = module(x)
    theirs = y.detach(), *torch.autograd.grad(y, (x, module.weight), g)
    ours = out_and_gradients(rms_norm, x, weight, g)
    unit = max(torch.finfo(dtype).eps, 32 * torch.finfo(torch.float32).eps)
    assert (ours[0].double() - theirs[0].double()).abs().max() <= unit * theirs[0].double().abs().max()
    # Gradients: ours are rounded once; theirs round the normed row's gradient and each term of the weight's too. Ours
    # are held to float64.
    exact = out_and_gradients(formula, x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(),
                              g.double())
    for got, other, want in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert got.dtype == dtype
        error, theirs_error = ((t.double() - want).abs().max() for t in (got, other))
        assert error <= max(theirs_error,
                            unit / 2 * want.abs().max() + 32 * torch.finfo(torch.float32).eps * want.abs().max())


def test_a_wide_weight_leaves_the_dtype_of_x():
    x, weight, g = drawn(4, 8)
    narrow, wide = x.detach().bfloat16().requires_grad_(), weight.detach().float().requires_grad_()
    y, dx, dweight = out_and_gradients(rms_norm, narrow, wide, g.bfloat16())
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = out_and_gradients(kernel.reference_rms_norm, narrow, wide, g.bfloat16())
    torch.testing.assert_close(y, expected[0], rtol=2 ** -8, atol=0)


def test_any_strides_will_do():
    x, weight, g = drawn(4, 6, 8)
    turned = x.detach().transpose(0, 1).requires_grad_()
    for fn in (rms_norm, lambda *args: torch.ops.xtf.rms_norm(*args)[0]):
        got = out_and_gradients(fn, turned, weight, g.transpose(0, 1))
        for a, b in zip(got, out_and_gradients(formula, turned, weight, g.transpose(0, 1)), strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def test_the_operator_is_well_formed():
    x, weight, g = drawn(4, 3, 8)
    torch.library.opcheck(torch.ops.xtf.rms_norm, (x, weight, 1e-3))
    torch.library.opcheck(torch.ops.xtf.rms_norm, (x.detach().transpose(0, 1), weight.detach(), 1e-3))
    torch.library.opcheck(torch.ops.xtf.rms_norm_backward,
                          (g, x.detach(), weight.detach(), torch.ones(4, 3, 1, dtype=torch.float64)))


def test_under_torch_func_and_compile():
    x, weight, g = drawn(4, 8)
    expected = torch.autograd.grad(rms_norm(x, weight, 1e-3), (x, weight), g)
    one = lambda x, weight, g: (rms_norm(x, weight, 1e-3) * g).sum()
    each = torch.func.vmap(torch.func.grad(one, argnums=(0, 1)), in_dims=(0, None, 0))
    dx, dweight = each(x.detach(), weight.detach(), g)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for got in ((dx, dweight.sum(0)), torch.autograd.grad(compiled(x, weight, 1e-3), (x, weight), g)):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    _, along = torch.func.jvp(lambda x: one(x, weight.detach(), g), (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected[0].sum(), rtol=EXACT, atol=EXACT)


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(torch.ones(2, 3), torch.ones(2), 1e-5)


def interpreted(*args):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, Path(__file__).with_name("interpreted.py"), *args], env=environment,
                          capture_output=True, text=True)


def test_triton_kernels_in_the_interpreter():
    run = interpreted()
    assert run.returncode == 0 and run.stdout.strip() == "exact", run.stderr


def test_the_canary_sees_that_the_interpreter_as_shipped_is_wrong():
    mended = "if Triton has mended its interpreter, `repair` in interpreted.py can go"
    assert interpreted("as-shipped").returncode == 3, mended


def compiled_for_hopper(fn, types: dict[str, str], constants: dict, num_warps: int) -> tuple[int, str]:
    """Bytes of stack a thread, and the machine code, of a kernel compiled without a GPU. Pointers are multiples of 16,
    as torch's are."""
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = ASTSource(fn=fn, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants,
                       attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["cubin"]
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        usage, code = (subprocess.run([tool, flag, f.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    return int(re.search(r"STACK:(\d+)", usage)[1]), code


@pytest.mark.parametrize("width", [64, 1024, 5120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_compiled_for_hopper_spill_nothing(width, dtype):
    launch = kernel._launch(torch.empty(1, width, dtype=dtype))
    num_warps = launch.pop("num_warps")
    x = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    assert launch["BLOCK"] >= 32 * num_warps                                     # the backward kernel's sums rely on it
    kernels = {kernel._forward_kernel: {"x_ptr": x, "weight_ptr": x, "y_ptr": x, "scale_ptr": "*fp32", "D": "i32",
                                        "eps": "fp32"},
               kernel._backward_kernel: {"g_ptr": x, "x_ptr": x, "weight_ptr": x, "scale_ptr": "*fp32", "dx_ptr": x,
                                         "dweight_ptr": "*fp32", "N": "i32", "D": "i32"}}
    for fn, types in kernels.items():
        stack, code = compiled_for_hopper(fn, types, launch, num_warps)
        assert stack == 0 and "LDG" in code and not re.search(r"\b(STL|LDL)\b", code)
