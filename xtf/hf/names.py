"""What a leaf is called in the files, and whether a directory's tensors are those of the leaves.

A name is that of one tensor; or with `{e}` in it that of as many as the leaf has rows, stacked
(`experts.{e}.up_proj.weight`); or, if it is `Transposed`, of a tensor whose last two dims are swapped in the files.
"""
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xtf.hf.quantised import Tensor, some
from xtf.hf.safetensors import Shape


class Wanted(NamedTuple):
    """One tensor as the leaves want it in the files: `dtype` is the leaf's."""
    shape: Shape
    dtype: torch.dtype
    leaf: str


class Transposed(str):
    """The name of a tensor that has its leaf's last two dims swapped in the files.

    >>> found = file_tensors({"down": Transposed("down_proj")}, "down", torch.ones(2, 3, 5))
    >>> {name: tuple(x.shape) for name, x in found.items()}
    {'down_proj': (2, 5, 3)}
    """


def file_tensors(names: Mapping[str, str], leaf: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """A whole leaf as the files have it: name -> view of `whole`.

    >>> found = file_tensors({"up": "experts.{e}.up"}, "up", torch.tensor([[1, 2], [3, 4]]))
    >>> {name: x.tolist() for name, x in found.items()}
    {'experts.0.up': [1, 2], 'experts.1.up': [3, 4]}
    """
    return {name: x for name, _, x in cut(names[leaf], (0,) * whole.ndim, whole)}


def cut(name: str, offset: Shape, box: torch.Tensor) -> Iterator[tuple[str, Shape, torch.Tensor]]:
    """A leaf's box as the files have it: (tensor, offset there, view). The only place that knows what names mean."""
    stacked = [(name, offset, box)]
    if "{e}" in name:
        stacked = [(name.replace("{e}", str(offset[0] + i)), offset[1:], x) for i, x in enumerate(box.unbind())]
    for file_name, at, x in stacked:
        yield (file_name, (*at[:-2], at[-1], at[-2]), x.mT) if isinstance(name, Transposed) else (file_name, at, x)


def wanted(leaves: Mapping[str, Any], names: Mapping[str, str], what: str) -> dict[str, Wanted]:
    """The tensors that these leaves (Params or tensors) are in the files: name -> (shape, dtype of the leaf)."""
    unnamed, unknown = sorted(leaves.keys() - names.keys()), sorted(names.keys() - leaves.keys())
    if unnamed or unknown:
        raise ValueError(f"hf: names and {what} do not fit: {what} without a name: {unnamed}; names without {what}: "
                         f"{unknown}; use the names(cfg) of the model and config that made them")
    out: dict[str, Wanted] = {}
    for leaf, x in leaves.items():
        for name, tensor in file_tensors(names, leaf, torch.empty(tuple(x.shape), device="meta")).items():
            if name in out:
                raise ValueError(f"hf: leaves {out[name].leaf} and {leaf} have the same name in the files, {name}; "
                                 "correct names")
            out[name] = Wanted(tuple(tensor.shape), x.dtype, leaf)
    return out


def match(path: str | Path, found: Mapping[str, Tensor], wanted: Mapping[str, Wanted], ignore: Sequence[str],
           tied: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Check files against leaves; (twin -> the tensor it repeats, ignored tensors). The error lists all wrongs."""
    def original(n: str | None) -> str | None:                           # the copy of a tied head is the embedding's
        while n is not None and n not in wanted:
            n = next((name for glob, name in tied.items() if fnmatchcase(n, glob)), None)
        return n
    twins = {n: name for n in found if n not in wanted and (name := original(n)) is not None}
    rest = [n for n in found if n not in wanted and n not in twins]
    ignored = {n: found[n] for n in rest if any(fnmatchcase(n, f"*{glob}") for glob in ignore)}
    missing = [n for n in wanted if n not in found]
    extra = [f"{n} ({found[n].file.name})" for n in rest if n not in ignored]
    wrong = [f"{n} ({found[n].file.name}) has shape {list(found[n].shape)}, expected {list(w.shape)}"
             for n, w in wanted.items() if n in found and found[n].shape != w.shape]
    wrong += [f"{n} ({found[n].file.name}) holds {found[n].dtype}, expected {w.dtype}"
              for n, w in wanted.items() if n in found
              and found[n].dtype.is_floating_point != w.dtype.is_floating_point]
    wrong += [f"{twin} ({found[twin].file.name}) is tied to {name} but differs in dtype or shape"
              for twin, name in twins.items()
              if name in found and (found[twin].dtype, found[twin].shape) != (found[name].dtype, found[name].shape)]
    if missing or extra or wrong:
        problems = ["missing: " + some(missing)] * bool(missing)
        problems += ["extra: " + some(extra) + " (pass ignore= if the model does not need them)"] * bool(extra)
        problems += [some(wrong, "; ")] * bool(wrong)
        raise ValueError(f"{path}: the tensors are not those of this model, check config.json. " + "; ".join(problems))
    return twins, ignored
