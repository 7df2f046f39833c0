"""The machine's answers against what the machine itself shows."""
import os
import subprocess
import sys
import textwrap
import timeit

import torch

from xtf import device


def run(script: str, **env: str) -> str:
    """A process of its own: what it sets cannot be taken back."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True,
                          env=os.environ | env).stdout


def test_peak_is_what_a_product_reaches():
    peak = device.peak_flops(torch.float32)
    assert device.peak_flops(torch.float32) == peak, "measured once"
    assert device.peak_flops(torch.float8_e4m3fn) == 2 * device.peak_flops(torch.bfloat16)
    a = torch.randn(512, 512, device=device.device())
    seconds = min(timeit.repeat(lambda: (a @ a, device.synchronize()), number=4, repeat=5)) / 4
    assert 0.1 < 2 * 512**3 / seconds / peak < 10  # the right order, on a machine that others use too


def test_datasheet_names_are_told_apart(monkeypatch):
    monkeypatch.setattr(device, "device", lambda: torch.device("cuda", 0))
    for name, tflops in {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H20": 148, "NVIDIA H200": 989,
                         "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10": 125, "NVIDIA L40S": 362, "NVIDIA L4": 121}.items():
        monkeypatch.setattr(device, "name", lambda name=name: name)
        assert device.peak_flops(torch.bfloat16) == tflops * 1e12, name


def test_memory_grows_with_what_is_touched():
    before, after = map(float, run("""
        import torch
        from xtf import device
        print(device.memory_gb())
        torch.ones(100_000_000)
        print(device.memory_gb())
    """).split())
    assert 0.35 < after - before < 0.45                                    # 0.4 GB of float32


def test_kept_pages_are_not_faulted_in_again():
    faults, kept = map(int, run("""
        import resource, torch
        from xtf import device
        count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def fill(times):
            start = count()
            for _ in range(times):
                torch.ones(16 << 20)                                       # 64 MiB: beyond what malloc keeps
            return count() - start
        print(fill(4))
        assert device.keep_pages()
        print(min(fill(4) for _ in range(12)))                             # holes come to fit after a few
    """).split())
    assert kept < faults / 20, (kept, faults)


def test_process_group_from_torchrun_variables():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = ("from xtf import device; import torch.distributed as d; "
              "print(*device.init_process_group(), d.get_backend()); d.destroy_process_group()")
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port)}
    assert run(script, **env).split() == ["0", "1", device.backend()]


def test_capability_names_what_figures_depend_on():
    text = device.capability()
    assert device.name() in text
    if device.device().type == "cpu":
        assert torch.backends.cpu.get_cpu_capability() in text and "bf16" in text
