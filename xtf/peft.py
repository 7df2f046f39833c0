"""Adapters in PEFT's format, adapter_config.json and adapter_model.safetensors: `peft` and inference engines read it.

A product's adapters are `base_model.model.<module>.lora_A.weight` [rank, in] and `lora_B` [out, rank], each expert a
module of its own. Where a model's files have one parameter for all experts (GPT-OSS), and in what PEFT itself writes
for experts, they are stacked: A is [E × rank, in], expert by expert, B is [out, rank × E], rank by rank, both under the
container's name; a container's second parameter is wrapped around its first, which is then called `base_layer`
(`ParamWrapper` in tuners/lora/layer.py of peft 0.21).
"""
import json
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

from xtf import hf, tree
from xtf.hf import safetensors as files
from xtf.hf.directory import mesh_of
from xtf.hf.safetensors import Shape
from xtf.layout import Place
from xtf.parallel._mesh import peers
from xtf.spec import init
from xtf.transforms._lora import A, B, Lora, adapters, base, join, lora

FILE, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# transformers 5 keeps both in one parameter: its name, which half
FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
FIRST = "gate_up_proj"  # the one that the other is wrapped around
ENDS = {A: "lora_A.weight", B: "lora_B.weight"}
HONOURED = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters",
            "use_rslora"}
# Of training, of bookkeeping, or said again by the tensors' names. Any other field must be empty or false.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
# others change the base
NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
OWN_MODULES = {"kimi_k2"}  # whose code, not transformers', has a module for each expert


def start(path: str | Path, specs: tree.Tree, names: Mapping[str, str], layout: tree.Tree | None = None,
          seed: int = 0) -> tree.Tree:
    """The parameters to begin with: `hf.load`, and adapters, if the specs have some, drawn from `seed`.

    `specs` and `layout` are those after the transforms (`shard(...).specs`, `.layout`), `names` the model's. Raises as
    `hf.load`.
    """
    loaded = hf.load(path, base(specs), names, base(layout))
    return join(loaded, init(adapters(specs), seed, None if layout is None else adapters(layout)))


def read(path: str | Path, names: Mapping[str, str], base_dtype: torch.dtype | None = None) -> Lora:
    """The transform that an adapter needs: its rank, its alpha, and as targets just the products that it has.

    Raises FileNotFoundError or ValueError, naming file and field, where the folder is not sound or holds what is not
    plain LoRA.
    """
    config, found = _config(path), files.header(Path(path) / FILE)
    targets = [leaf.removesuffix(".weight") for leaf in names
               if leaf.endswith(".weight") and _source(config, found, names[leaf])]
    if not targets:
        raise ValueError(f"{Path(path) / FILE}: no adapter is of a product of this model; is it an adapter of another?")
    return lora(config["r"], config["lora_alpha"], targets, base_dtype)


def load(path: str | Path, specs: tree.Tree, names: Mapping[str, str], adapter: Lora,
         layout: tree.Tree | None = None) -> tree.Tree:
    """The adapters of a folder, at their paths in `specs` (after the transforms), to be joined with the base:

        adapter = peft.read(folder, names)
        step = xtf.shard(train_step, adapter, ..., mesh=mesh, specs=specs)
        params = lora.join(hf.load(model, lora.base(step.specs), names, lora.base(step.layout)),
                           peft.load(folder, step.specs, names, adapter, step.layout))

    Each rank reads its part (of stacked experts: the whole of one leaf at a time). The gate and up adapters that PEFT
    fused, or that it trained with one A for both, are taken apart.

    Raises FileNotFoundError or ValueError naming every tensor that is missing, left over or misshapen, or what else is
    wrong.
    """
    config, found = _config(path), files.header(Path(path) / FILE)
    scale = config["lora_alpha"] / config["r"]
    if not math.isclose(scale, adapter.scale):
        raise ValueError(f"{Path(path) / CONFIG}: its adapters are scaled by {scale:g}, the transform's by "
                         f"{adapter.scale:g}; make the transform with xtf.peft.read")
    used: set[str] = set()
    wrong: list[str] = []

    def one(leaf: str, spec: Any, place: Place | None) -> torch.Tensor:
        node, _, which = leaf.rpartition(".")
        source = _source(config, found, names[f"{node}.weight"])
        offset, size = ((0,) * len(spec.shape), spec.shape) if place is None else place.box(spec.shape)
        try:
            values = _read(found, source, which, spec.shape, offset, size, used).to(spec.dtype)
        except ValueError as e:
            wrong.append(f"{leaf}: {e}")
            values = torch.empty(size, dtype=spec.dtype)
        return (values if place is None else place.from_local(values, spec.shape)).requires_grad_(spec.trainable)

    wanted = adapters(specs)
    places = tree.tree_map(lambda _: None, wanted) if layout is None else adapters(layout)
    values = tree.map_with_path(one, wanted, places)
    if left := sorted(found.keys() - used):
        wrong.append(f"the specs have no adapter for {', '.join(left)}")
    if wrong:
        raise ValueError(f"{Path(path) / FILE} does not fit, make the transform with xtf.peft.read: "
                         + "; ".join(wrong))
    return values


def save(path: str | Path, params: tree.Tree, names: Mapping[str, str], adapter: Lora, model: str | Path = "") -> None:
    """Write the adapters among `params` as a folder that `peft.PeftModel.from_pretrained(model, path)` reads.

    All ranks write together.

    `model` is the directory or hub id of the base, which the config names. The folder appears, or replaces what was
    there, when it is complete. Leaves keep their dtype. (peft reads experts' `gate` only together with `up`, since
    transformers has both in one parameter.)

    Raises ValueError if there are no adapters, and as `hf.save`.
    """
    path = Path(path).resolve()
    leaves = dict(tree.flatten_with_path(adapters(params)))
    nodes = list(dict.fromkeys(leaf.rpartition(".")[0] for leaf in leaves))
    if not nodes:
        raise ValueError(f"peft.save: {path}: the parameters have no adapters; train with the lora transform, or use "
                         "hf.save")
    weights = {node: names[f"{node}.weight"] for node in nodes}
    wanted, values = {}, {}
    for leaf, x in leaves.items():
        node, _, which = leaf.rpartition(".")
        stem, stacked = _stem(weights[node], list(weights.values()))
        wanted[leaf], values[leaf] = f"{PREFIX}{stem}.{ENDS[which]}", _stacked(which, x) if stacked else x
    work, together = files.partial(path), peers(mesh_of(values.values()))
    together.tell("peft.save: begin", lambda: files.begin(path).rmdir())  # refuses a folder that is something else
    with tempfile.TemporaryDirectory() as like:
        config = _config_of(list(weights.values()), list(names.values()), adapter, str(model))
        Path(like, CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        hf.save(work, values, wanted, like=like, max_shard_bytes=1 << 62, peers=together)

    def finish() -> None:
        (work / files.SINGLE).rename(work / FILE)
        files.finish(path)
    together.tell("peft.save: finish", finish)


# ---- writing ---------------------------------------------------------------------------------------------------------

def _stem(name: str, adapted: Sequence[str]) -> tuple[str, bool]:
    """(what stands before lora_A for a weight of this name, whether its experts are stacked)."""
    if name.endswith(".weight"):
        return name.removesuffix(".weight"), False
    container = name.rpartition(".")[0]
    siblings = [n for n in adapted if n.rpartition(".")[0] == container]
    return container + ".base_layer" * (len(siblings) - 1 - siblings.index(name)), True


def _stacked(which: str, x: torch.Tensor) -> torch.Tensor:
    """All experts' A [E, rank, in] as [E × rank, in], B [E, out, rank] as [out, rank × E]; of a DTensor this rank's."""
    whole = (x.full_tensor() if isinstance(x, DTensor) else x).detach()
    flat = whole.flatten(0, 1) if which == A else whole.permute(1, 2, 0).flatten(1)
    return Place(x.device_mesh, (Shard(0),) * x.device_mesh.ndim).put(flat) if isinstance(x, DTensor) else flat


def _config_of(adapted: Collection[str], everything: Collection[str], adapter: Lora, model: str) -> dict[str, Any]:
    """adapter_config.json. Modules go by their last name (parameters by two) where all of that name have adapters.

    Else they go by their full ones.

    Under transformers 5 peft takes `gate_proj`, `up_proj` and `down_proj`, in whatever module, for the experts'
    parameters if the model has experts, so others of these names (shared experts', dense layers') are listed as
    parameters, not as modules.
    """
    short = lambda name: ".".join(name.removesuffix(".weight").split(".")[-1 if name.endswith(".weight") else -2:])
    bare = {short(n) for n in everything if n not in adapted and "{e}" not in n}
    called = lambda name: name.removesuffix(".weight") if short(name) in bare else short(name)
    experts = {short(n) for n in everything if "{e}" in n}
    modules = [n for n in adapted if n.endswith(".weight") and "{e}" not in n]
    doubles = [] if _model_type(model) in OWN_MODULES else [n for n in modules if short(n) in experts]
    parameters = sorted({*doubles, *(called(n) for n in adapted if not n.endswith(".weight"))})
    names = {called(n) for n in modules if n not in doubles} | {short(n) for n in adapted if "{e}" in n}
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "r": adapter.rank,
            "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": False, "bias": "none", "fan_in_fan_out": False,
            "inference_mode": True, "modules_to_save": None,
            "target_modules": sorted(names)} | ({"target_parameters": parameters} if parameters else {})


def _model_type(model: str) -> str | None:
    file = Path(model) / "config.json"
    return json.loads(file.read_text()).get("model_type") if model and file.is_file() else None


# ---- reading ---------------------------------------------------------------------------------------------------------

def _config(path: str | Path) -> dict[str, Any]:
    """The honoured fields of a folder's config; `lora_alpha` is such that adapters are scaled by lora_alpha / r."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the folder of a PEFT adapter, the one that holds {CONFIG}")
    try:
        config = json.loads(file.read_text())
        r, alpha = config["r"], config["lora_alpha"]
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        if not (config["peft_type"] == "LORA" and r > 0 and alpha > 0):
            raise ValueError(f"peft_type {config['peft_type']}, r {r}, lora_alpha {alpha}: must be LORA, and positive")
        same = all(math.isclose(alphas.get(key, alpha) / ranks.get(key, r), alpha / r) for key in {*ranks, *alphas})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{file}: not the config of a LoRA adapter ({type(e).__name__}: {e})") from None
    for key, value in config.items():
        known = key in {*NEUTRAL, *HONOURED, *WITHOUT_EFFECT}
        if (key in NEUTRAL and value not in NEUTRAL[key]) or (value and not known):
            raise ValueError(f"{file}: {key} = {value!r} is not supported; merge that adapter with peft, and load the "
                             "merged model")
    if not same or (config.get("use_rslora") and (ranks or alphas)):
        raise ValueError(f"{file}: rank_pattern and alpha_pattern scale some adapters differently: not supported")
    parameters = {name.rpartition(".")[2] for name in config.get("target_parameters") or ()}
    return {"r": r, "lora_alpha": alpha * (math.sqrt(r) if config.get("use_rslora") else 1),
            "target_parameters": parameters}


class Source(NamedTuple):
    """Where a file has one product's adapters: before `.lora_A`, and which half of B's rows, if they are stacked."""
    stem: str
    stacked: bool = False
    half: int | None = None


def _source(config: Mapping[str, Any], found: Mapping[str, Any], name: str) -> Source | None:
    module, is_module = name.removesuffix(".weight"), name.endswith(".weight")
    there = lambda stem: f"{PREFIX}{stem}.{ENDS[A]}" in found
    if is_module and there(module.replace("{e}", "0")):
        return Source(module)
    if is_module and "{e}" not in name:
        return None
    container, _, last = module.partition(".{e}.") if "{e}" in name else module.rpartition(".")
    parameter, half = FUSED.get(last, (last, None))
    inner = f"{container}.base_layer"
    if not there(container) or not (there(inner) or parameter in config["target_parameters"]):
        return None
    return Source(inner if there(inner) and parameter == FIRST else container, True, half)


def _read(found: Mapping[str, files.Entry], source: Source | None, which: str, shape: Shape, offset: Shape, size: Shape,
          used: set[str]) -> torch.Tensor:
    """The box [offset, offset + size) of a leaf of `shape`; `used` gains the names of the leaf's tensors."""
    if source is None:
        raise ValueError("the file has no adapter for it")
    name = f"{PREFIX}{source.stem}.{ENDS[which]}"
    experts = "{e}" in name
    parts = [name.replace("{e}", str(e)) for e in range(shape[0])] if experts else [name]
    used.update(parts)
    for part in parts:
        if part not in found:
            raise ValueError(f"{part} is missing")
        if not source.stacked and found[part].shape != shape[experts:]:
            raise ValueError(f"{part} has shape {list(found[part].shape)}, expected {list(shape[experts:])}")
    if experts:
        out = torch.empty(size, dtype=found[parts[0]].dtype)
        for i, row in enumerate(out):
            row.copy_(files.read(found[parts[offset[0] + i]], offset[1:], size[1:]))
        return out
    if not source.stacked:
        return files.read(found[name], offset, size)
    flat = files.read(found[name], (0, 0), found[name].shape)
    if flat.shape[which == B] % shape[0]:
        raise ValueError(f"{name} has shape {list(flat.shape)}, which does not divide over {shape[0]} experts")
    whole = flat.unflatten(0, (shape[0], -1)) if which == A else flat.unflatten(1, (-1, shape[0])).permute(2, 0, 1)
    if source.half is not None:
        whole = _half(name, which, whole, source.half, rank=shape[1 if which == A else 2])
    if whole.shape != shape:
        raise ValueError(f"{name} has shape {list(flat.shape)}, so this leaf {list(whole.shape)}; expected "
                         f"{list(shape)}")
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].contiguous()


def _half(name: str, which: str, whole: torch.Tensor, half: int, rank: int) -> torch.Tensor:
    """gate's (0) or up's (1) part of what is fused: trained as one, both with one A, or of two with a `rank` each."""
    mine = slice(half * rank, (half + 1) * rank)
    if which == A:
        return whole[:, mine] if whole.shape[1] == 2 * rank else whole
    rows = whole.chunk(2, 1)[half]
    if whole.shape[2] != 2 * rank:
        return rows
    if rows.count_nonzero() != rows[..., mine].count_nonzero():
        raise ValueError(f"{name}: gate and up are mixed, so its rank is {2 * rank}, not {rank}")
    return rows[..., mine]
