"""Quantised tensors of Hugging Face directories: two or more tensors in the files that are read, box by box, as one.

Two formats. Block FP8 (DeepSeek V3, Kimi K2; section 3.3.2 of arXiv:2412.19437): X in float8_e4m3fn and X_scale_inv, a
scale for each block of 128 × 128, so that values are q · scale. MXFP4 (GPT-OSS; OCP Microscaling Formats 1.0): X_blocks
[..., groups, 16] with two e2m1 numbers a byte, the lower nibble first, and X_scales [..., groups], the biased exponent
of each 32 numbers.
"""
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from xtf.hf import safetensors as files
from xtf.hf.safetensors import Entry, Shape

FP8, LARGEST = torch.float8_e4m3fn, 448.0
SCALE = "_scale_inv"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
PAIRS = torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)])
PRODUCTS = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class BlockFp8:
    """X and X_scale_inv as one: values [..., rows, columns], scales [..., ⌈rows / block⌉, ⌈columns / block⌉]."""
    values: Entry
    scales: Entry
    name: str
    block: tuple[int, ...]
    dtype = torch.bfloat16                                               # what it is where it is not quantised

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def shape(self) -> Shape:
        return self.values.shape


@dataclass(frozen=True)
class Mxfp4:
    """X_blocks [E, rows, groups, 16] and X_scales [E, rows, groups] as one [E, 32 · groups, rows]: as X is in bf16."""
    values: Entry
    scales: Entry
    name: str
    dtype = torch.bfloat16

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def shape(self) -> Shape:
        *experts, rows, groups, _ = self.values.shape
        return (*experts, 32 * groups, rows)


Tensor = Entry | BlockFp8 | Mxfp4


def config(path: str | Path) -> dict[str, Any]:
    """The quantization_config of a directory's config.json; empty where there is none.

    Raises ValueError, naming file and field, where it is not one of the two formats.
    """
    file = Path(path) / "config.json"
    try:
        found = (json.loads(file.read_text()).get("quantization_config") or {}) if file.is_file() else {}
        method = found.get("quant_method")
    except (ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f"{file}: not a model's configuration ({type(e).__name__}: {e}); fetch it again") from e
    only = {"quant_method": ("fp8", "mxfp4")}
    if method == "fp8":
        only |= {"fmt": ("e4m3", None), "scale_fmt": ("float", "ue8m0", None), "expert_dtype": ("fp8", None),
                 "activation_scheme": ("dynamic", None)}
    for name, values in only.items() if found else ():
        if found.get(name) not in values:
            raise ValueError(f"{file}: quantization_config.{name}={found.get(name)!r} is not supported, only "
                             f"{', '.join(map(str, values))}; convert the directory first")
    size = found.get("weight_block_size", [128, 128])
    sound = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if method == "fp8" and not sound:
        raise ValueError(f"{file}: quantization_config.weight_block_size={size!r} is not supported, only two whole "
                         "numbers; convert the directory first")
    return found


def configured(text: bytes, settings: Mapping[str, Any]) -> bytes:
    """A config.json whose quantization_config is `settings` (none if empty); the same bytes where it is so already."""
    fields = json.loads(text)
    if (fields.get("quantization_config") or {}) == settings:
        return text
    fields = {k: v for k, v in fields.items() if k != "quantization_config"}
    fields |= {"quantization_config": dict(settings)} if settings else {}
    return (json.dumps(fields, indent=2) + "\n").encode()


def fold(path: str | Path, found: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a directory; the quantised ones each as one, under the name and shape of bf16 directories.

    Raises ValueError listing every quantised tensor of which a part is missing or does not fit the others.
    """
    out: dict[str, Tensor] = dict(found)
    if not config:
        return out
    fp8 = config["quant_method"] == "fp8"
    block = tuple(config.get("weight_block_size", (128, 128)))
    one, two = ("", SCALE) if fp8 else ("_blocks", "_scales")
    names = [n.removesuffix(two) for n in found if n.endswith(two)]
    names += [n.removesuffix(one) for n, e in found.items() if (e.dtype == FP8 if fp8 else n.endswith(one))]
    wrong = []
    for name in dict.fromkeys(names):
        values, scales = (out.pop(name + end, None) for end in (one, two))
        where = ", ".join(f"{name + end} ({e.file.name})" for end, e in ((one, values), (two, scales)) if e is not None)
        if values is None or scales is None:
            wrong.append(f"{where} without {name + (one if values is None else two)}")
            continue
        assert isinstance(values, Entry) and isinstance(scales, Entry)
        if fp8:
            want = grid(values.shape, block)
            fits = (values.dtype == FP8 and len(values.shape) > 1
                    and scales.dtype.is_floating_point and scales.shape == want)
            wants = f"torch.float8_e4m3fn and, for blocks of {block[0]} × {block[1]}, floating scales {list(want)}"
            out[name] = BlockFp8(values, scales, name, block)
        else:
            fits = (values.dtype == scales.dtype == torch.uint8
                    and values.shape == (*scales.shape, 16) and len(scales.shape) == 3)
            wants = "uint8 [experts, rows, groups, 16] and [experts, rows, groups]"
            if name in found:
                wrong.append(f"{where} and {name} ({found[name].file.name}) too; remove the one that is not meant")
            out[name] = Mxfp4(values, scales, name)
        if not fits:
            wrong.append(f"{where} hold {values.dtype} {list(values.shape)} and {scales.dtype} {list(scales.shape)}, "
                         f"expected {wants}")
    if wrong:
        raise ValueError(f"{path}: quantised tensors are incomplete, fetch them again. " + some(wrong, "; "))
    return out


def some(names: Sequence[str], between: str = ", ", many: int = 20) -> str:
    """A list for an error message, cut short where it is long (a model may have 50,000 tensors).

    >>> some(["a", "b", "c"], many=2)
    'a, b, and 1 more'
    """
    return between.join(names[:many]) + f"{between}and {len(names) - many} more" * (len(names) > many)


def grid(shape: Shape, block: tuple[int, ...]) -> Shape:
    """How many blocks a tensor has: the shape of its scales.

    >>> grid((3, 576, 7168), (128, 128))
    (3, 5, 56)
    """
    return (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block, strict=False)))


def read_into(tensor: Tensor, offset: Shape, out: torch.Tensor) -> None:
    """Fill `out` with the box at `offset`: values · scales in float32, then converted to its dtype.

    That is what transformers' Fp8Dequantize and convert_moe_packed_tensors compute, bit for bit in every dtype. Reads
    no more than the box, its scales and, of MXFP4, the rest of the groups of 32 that it cuts.

    Raises ValueError naming the tensor where a scale is not finite.
    """
    if isinstance(tensor, Entry):
        return files.read_into(tensor, offset, out)
    step = max(1, (1 << 22) // max(1, out[:1].numel()))                  # float32 for a part at a time
    for i in range(0, len(out) if out.numel() else 0, step):
        at, part = (offset[0] + i, *offset[1:]), out[i:i + step]
        part.copy_(_fp8(tensor, at, tuple(part.shape)) if isinstance(tensor, BlockFp8)
                   else _mxfp4(tensor, at, tuple(part.shape)))


def _fp8(tensor: BlockFp8, offset: Shape, size: Shape) -> torch.Tensor:
    where = covered(offset, size, tensor.block)
    scales = files.read(tensor.scales, tuple(w.start for w in where), tuple(w.stop - w.start for w in where)).float()
    _check(bool(scales.isfinite().all()), tensor)
    return files.read(tensor.values, offset, size).float().mul_(_spread(scales, offset, size, tensor.block))


def _mxfp4(tensor: Mxfp4, offset: Shape, size: Shape) -> torch.Tensor:
    (expert, column, row), (experts, columns, rows) = offset, size
    first = column // 32
    groups = -(-(column + columns) // 32) - first
    scales = files.read(tensor.scales, (expert, row, first), (experts, rows, groups))
    _check(not bool((scales == 255).any()), tensor)                      # not a number, in e8m0
    pairs = F.embedding(files.read(tensor.values, (expert, row, first, 0), (experts, rows, groups, 16)).int(), PAIRS)
    values = pairs.flatten(-2).mul_(scales.view(torch.float8_e8m0fnu).float()[..., None]).flatten(-2)
    return values[..., column - 32 * first:][..., :columns].mT


def _check(finite: bool, tensor: BlockFp8 | Mxfp4) -> None:
    if not finite:
        raise ValueError(f"{tensor.scales.file}: {tensor.name} has scales that are not finite; the file is corrupt, "
                         "fetch it again")


def covered(offset: Shape, size: Shape, block: tuple[int, ...]) -> tuple[slice, ...]:
    """The blocks that a box touches, as slices of its tensor's scales.

    >>> covered((0, 100), (128, 60), (128, 128))
    (slice(0, 1, None), slice(0, 2, None))
    """
    widths = (1,) * (len(offset) - 2) + block
    return tuple(slice(o // b, -(-(o + n) // b)) for o, n, b in zip(offset, size, widths, strict=True))


def _spread(scales: torch.Tensor, offset: Shape, size: Shape, block: tuple[int, ...]) -> torch.Tensor:
    """The scale of each number of a box, from those of the blocks that it touches."""
    for dim in (-2, -1):
        scales = scales.repeat_interleave(block[dim], dim).narrow(dim, offset[dim] % block[dim], size[dim])
    return scales


# ---- on the way out --------------------------------------------------------------------------------------------------

class Fp8Out(NamedTuple):
    """How a tensor is quantised: the scales' dtype, whether they are powers of two, and those that `like` has."""
    block: tuple[int, ...]
    scale_dtype: torch.dtype
    power_of_two: bool
    old: Entry | None


def fp8_out(like: Mapping[str, Tensor], config: Mapping[str, Any],
            wanted: Mapping[str, Shape]) -> tuple[dict[str, Fp8Out], dict[str, Any]]:
    """Which tensors to write as block FP8, and the quantization_config that says so.

    As `like` has them if it is an FP8 directory; else DeepSeek's choice: the matrices of attention, MLP and experts, of
    which the router is none.

    Raises ValueError at experts stacked in one tensor, for which there is no such format.
    """
    if any(isinstance(t, BlockFp8) for t in like.values()):
        power = config.get("scale_fmt") == "ue8m0"
        out = {n: Fp8Out(t.block, t.scales.dtype, power, t.scales)
               for n, t in like.items() if isinstance(t, BlockFp8)}
        return out, dict(config)
    stacked = [n for n, shape in wanted.items() if len(shape) > 2]
    if stacked:
        raise ValueError(f"hf.save: {stacked[0]} holds all experts; block FP8 has a tensor for each of them: write "
                         "bf16 (without --export-fp8, quantise=None)")
    return {n: Fp8Out((128, 128), torch.float32, False, None) for n in wanted if PRODUCTS.search(n)}, DEEPSEEK


def measure(x: torch.Tensor, offset: Shape, out: Fp8Out, old: torch.Tensor | None, name: str) -> torch.Tensor:
    """Of each block that box `x` touches, [2, ..., rows, columns]: its maximum, and 1 if `old` scales are not exact.

    Maxima of both over all ranks are what `choose` needs, so that boxes need not end where blocks do.

    Raises ValueError naming the tensor if a value is not finite.
    """
    if not x.isfinite().all():
        raise ValueError(f"hf.save: {name} has values that are not finite, which FP8 cannot hold; look into the run, "
                         "or write bf16 (quantise=None)")
    unlike = torch.ones_like(x, dtype=torch.float32)
    if old is not None:
        shape = tuple(x.shape)
        scales = _spread(old.to(x.device)[covered(offset, shape, out.block)].float(), offset, shape, out.block)
        unlike = (_to_fp8(x, scales).float().mul_(scales).to(x.dtype) != x).float()
    pads = [n for dim in (-1, -2)
            for n in (offset[dim] % out.block[dim], -(offset[dim] + x.shape[dim]) % out.block[dim])]
    both = F.pad(torch.stack([x.abs().float(), unlike]), pads)
    return both.unflatten(-1, (-1, out.block[1])).unflatten(-3, (-1, out.block[0])).amax((-3, -1))


def choose(measured: torch.Tensor, out: Fp8Out, old: torch.Tensor | None) -> torch.Tensor:
    """The scales [..., rows, columns] from `measure`'s maxima: the old one where it says the block exactly, so that
    what did not change is written as it was; else largest magnitude / 448, as DeepSeek's quantiser (rounded up to a
    power of two if theirs are; 1 for a block of zeros).
    """
    largest, unlike = measured
    new = torch.where(largest > 0, largest / LARGEST, 1.0)
    if out.power_of_two or out.scale_dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(new)
        new = torch.ldexp(torch.ones_like(new), exponent - (mantissa == 0.5).int())
    new = new.to(out.scale_dtype)
    if old is None:
        return new
    return torch.where(unlike.bool(), new.float(), old.to(new.device).float()).to(out.scale_dtype)


def encode(x: torch.Tensor, offset: Shape, scales: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """The box `x` in float8_e4m3fn: x / scale, where `scales` are those of the whole tensor."""
    here = scales.to(x.device)[covered(offset, tuple(x.shape), block)].float()
    return _to_fp8(x, _spread(here, offset, tuple(x.shape), block))


def _to_fp8(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (x.float() / scales).clamp_(-LARGEST, LARGEST).to(FP8)
