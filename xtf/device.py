"""The machine under the program, and the only home of questions about cuda, npu and cpu."""
import ctypes
import functools
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# Dense bf16 FLOP/s by datasheet, without sparsity; the first name found in the device's own is taken.
PEAK_BF16 = {
    "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H800": 989e12, "H20": 148e12,
    "GH200": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12,
    "A10": 125e12, "V100": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12, "MI325X": 1307e12,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def device() -> torch.device:
    """The accelerator that this process works on, with its index, or the CPU.

    >>> device().type in ("cpu", "cuda", "npu", "xpu", "mps")
    True
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def backend() -> str:
    """The collective library of this device: nccl, hccl, gloo..."""
    return dist.get_default_backend_for_device(device().type)


def name() -> str:
    """The device's name as its maker gives it (the processor's on CPU)."""
    kind = device().type
    if kind == "cpu":
        return _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    module = torch.get_device_module(kind)
    return module.get_device_name() if hasattr(module, "get_device_name") else kind


def capability() -> str:
    """One line for reports: what figures measured here depend on.

    On CPU: the instruction set that torch uses, whether bf16 products are native, and the threads.
    """
    if device().type == "cpu":
        bf16 = "native" if native_bf16() else "emulated"
        return (f"{name()}, {torch.backends.cpu.get_cpu_capability()}, bf16 products {bf16}, "
                f"{torch.get_num_threads()} threads")
    free, total = torch.accelerator.get_memory_info()
    return (f"{name()}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), "
            f"{torch.accelerator.device_count()} of them here")


def native_bf16() -> bool:
    """Whether bf16 products pay: not on a CPU without such instructions (10 to 100 times slower than fp32)."""
    return device().type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_fused_adamw(where: torch.device) -> bool:
    """Whether torch's fused AdamW kernel runs on that device (torch-npu brings none)."""
    return where.type in ("cpu", "cuda", "meta")


def host_copy(make: Callable[[], torch.Tensor], work: Any, keep: Any,
              where: torch.device) -> Callable[[], torch.Tensor]:
    """Start bringing `make()`, which needs what `work` brings, to the host; the function returned waits for it.

    On an accelerator the copy goes to pinned memory on a stream of its own, so that the host may wait for it without
    waiting for what was launched since. `keep` is what the message reads: waiting for a work lets go of it, and on
    another stream than the one whose allocator owns it that would be too early, so it is held until the copy is here.
    """
    def bring() -> torch.Tensor:
        work.wait()
        source = make()
        if source.device.type in ("cpu", "meta"):
            return source
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)

    arrived = _aside(bring, where)

    def finished() -> torch.Tensor:
        nonlocal keep
        copy = arrived()
        keep = None
        return copy
    return finished


def _aside(run: Callable[[], torch.Tensor], where: torch.device) -> Callable[[], torch.Tensor]:
    """Start `run` on a stream of its own; the function returned waits for it, on the host and on the current stream.

    On CPU (and for tensors that are only planned for, on meta) the other stream is as late as one may be: it runs when
    it is waited for.
    """
    if where.type in ("cpu", "meta"):
        return run
    stream = _copy_stream()
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        out, done = run(), torch.Event(where.type)
        done.record(stream)

    def finished() -> torch.Tensor:
        done.synchronize()
        torch.accelerator.current_stream().wait_stream(stream)      # what was made there is used here, too
        return out
    return finished


def read_later(values: Mapping[str, Any]) -> Callable[[], dict[str, float]]:
    """Start bringing scalars (tensors or numbers) to the host; the function returned waits for them and nothing since.

    Called right after a step and asked after the next one was launched, it makes nobody wait: the copy goes to pinned
    memory, and an event, not the stream, says that it is there.

    >>> read_later({"loss": torch.tensor(0.5), "step": 3})()
    {'loss': 0.5, 'step': 3.0}
    """
    tensors = {name: x.detach() for name, x in values.items() if isinstance(x, torch.Tensor)}
    here = {name: float(x) for name, x in values.items() if name not in tensors}
    copies: list[tuple[list[str], torch.Tensor]] = []
    for where in dict.fromkeys(x.device for x in tensors.values()):
        names = [name for name, x in tensors.items() if x.device == where]
        both = torch.stack([tensors[name].double() for name in names])
        if type(both) is not torch.Tensor or where.type == "meta":       # `xtf.plan`'s have no numbers
            here |= dict.fromkeys(names, math.nan)
            continue
        if where.type != "cpu":
            both = torch.empty(both.shape, dtype=both.dtype, pin_memory=True).copy_(both, non_blocking=True)
        copies.append((names, both))
    done = None
    if any(x.device.type not in ("cpu", "meta") for x in tensors.values()):
        done = torch.Event(device().type)
        done.record()

    def read() -> dict[str, float]:
        if done is not None:
            done.synchronize()
        read = here | {name: x for names, both in copies for name, x in zip(names, both.tolist(), strict=True)}
        return {name: read[name] for name in values}
    return read


@functools.cache
def _copy_stream() -> torch.Stream:
    return torch.Stream(device().type)


def piece(where: torch.device) -> int:
    """How many numbers a chain of elementwise passes takes at a time: to fit a CPU's cache, or to fill a GPU."""
    return 1 << 19 if where.type == "cpu" else 1 << 26


def norm_piece(where: torch.device) -> int:
    """How many float32 numbers torch's norm may take at once without losing digits: a CPU's lanes add in float32."""
    return 1 << 14 if where.type == "cpu" else 1 << 40


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of dense products in `dtype` on one device: the denominator of MFU.

    bf16 and fp16 come from the maker's datasheet, fp8 is twice that; where no datasheet figure is known (other dtypes,
    other devices, any CPU) the best of a few square products is measured, once a process. bf16 on a CPU without bf16
    products counts as fp32, in which it is computed.

    >>> peak_flops(torch.float32) > 1e8
    True
    """
    sheet = next((flops for label, flops in PEAK_BF16.items() if device().type == "cuda" and label in name()), None)
    if sheet and dtype in (torch.bfloat16, torch.float16):
        return sheet
    if dtype in FP8:
        return 2 * peak_flops(torch.bfloat16)
    return _measured_peak(torch.float32 if dtype is torch.bfloat16 and not native_bf16() else dtype,
                          torch.get_num_threads())


@functools.cache
def _measured_peak(dtype: torch.dtype, threads: int) -> float:
    n = 1024 if device().type == "cpu" else 8192
    a = torch.randn(n, n, device=device()).to(dtype)
    out, times = torch.empty_like(a), []
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])


def total_memory() -> int:
    """Bytes of memory that this process's device has (the machine's on CPU).

    >>> total_memory() > 10**8
    True
    """
    if device().type != "cpu":
        return torch.accelerator.get_memory_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_gb() -> float:
    """The most memory held so far, in GB of 10^9 bytes: allocated on the accelerator, or resident, on CPU.

    >>> memory_gb() > 0.01
    True
    """
    if device().type != "cpu":
        return torch.accelerator.max_memory_allocated() / 1e9
    peak = _proc("/proc/self/status", "VmHWM")
    if peak:
        return int(peak.split()[0]) * 1024 / 1e9
    import resource  # not on Windows; macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def synchronize() -> None:
    """Wait for everything that was sent to the accelerator."""
    if device().type != "cpu":
        torch.accelerator.synchronize()


def seed(value: int) -> None:
    """Seed every ambient generator: Python's, numpy's, torch's. xtf itself draws from explicit keys."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def init_process_group() -> tuple[int, int]:
    """Join the ranks that torchrun started; returns (rank, world), (0, 1) without torchrun.

    Takes the accelerator numbered LOCAL_RANK. On CPU divides the processors among the ranks of this machine, unless
    OMP_NUM_THREADS says otherwise (torchrun itself sets it to 1, which is therefore taken as unsaid).

    >>> init_process_group()
    (0, 1)
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    if device().type == "cpu":
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        dist.init_process_group(backend())
    else:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend(), device_id=device())
    return dist.get_rank(), dist.get_world_size()


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_pages() -> bool:
    """Let freed CPU memory stay with the process, for the next large tensor; True if the allocator agreed.

    glibc returns every block above 32 MiB to the kernel when it is freed, and the next one is zeroed anew page by page:
    filling a fresh 64 MB tensor takes 24 ms, and 3 ms with pages kept. No block is mapped by itself any more
    (M_MMAP_MAX = 0) and the heap is never trimmed (M_TRIM_THRESHOLD = -1), so resident memory stays at its peak. Only
    for glibc on Linux, and only of use on CPU.
    """
    if device().type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                # malloc.h
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def _proc(path: str, field: str) -> str | None:
    """The first line `field: value` of a /proc file; None where there is none."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return next((line.partition(":")[2].strip() for line in file if line.partition(":")[0].strip() == field), None)
