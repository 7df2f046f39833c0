"""Kernels: one file each, with a reference in plain torch beside the fast version."""
import torch
from torch._subclasses.fake_tensor import FakeTensor


def functorch_active() -> bool:
    """Whether a `torch.func` transform (vmap, grad, jvp, ...) is running: then the references do the work."""
    return torch._C._are_functorch_transforms_active()


def traced() -> bool:
    """Whether torch.compile or a mode (FlopCounterMode, ...) looks at operators: it is shown those that have formulas.

    FakeTensorMode alone is shown what runs without it, so that `xtf.plan` counts the memory inside a kernel too.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > _faking()


def _faking() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no numbers (`xtf.plan`): nothing may read it, no kernel be launched on it."""
    return isinstance(x, FakeTensor)


def as_cuda(x: torch.Tensor) -> bool:
    """Whether what is made for CUDA computes this tensor: the device `meta` stands for a GPU that is planned for."""
    return x.device.type in ("cuda", "meta")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are taken: float32 for anything narrower.

    >>> at_least_float32(torch.bfloat16), at_least_float32(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


# Asked once: torch.compile does not trace these questions.
_SLOW_ON_CPU = tuple(dtype for dtype, fast in ((torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
                                               (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported))
                     if not fast())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a product of `dtype` operands: float32 for bf16 and fp16 on processors without such products.

    There a bf16 product is up to a hundred times as slow as a float32 one.

    >>> product_dtype(torch.float64, torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "cpu" and dtype in _SLOW_ON_CPU else dtype
