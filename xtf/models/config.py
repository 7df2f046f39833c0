"""Hugging Face's config.json, with nothing in it lost: honoured, known to be without effect, or refused by name.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling` with `type`, `torch_dtype`) and 5
(`rope_parameters`, `dtype`).
"""
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import msgspec

from xtf import nn

C = TypeVar("C", bound=msgspec.Struct)


class LayerTypes(Protocol):
    """What `layer_windows` reads of a `Config`."""
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def layer_types(self) -> tuple[str, ...] | None: ...


class Windowed(LayerTypes, Protocol):
    """What `resolve_windows` reads of a `Config`."""
    @property
    def use_sliding_window(self) -> bool: ...
    @property
    def max_window_layers(self) -> int: ...


W = TypeVar("W", bound=Windowed)

# Fields that change nothing in what these families compute, given token ids: labels, tokenizer, saving, caching,
# generation.
NO_EFFECT = frozenset("""
    model_type architectures transformers_version _name_or_path name_or_path _commit_hash torch_dtype dtype torchscript
    use_bfloat16 use_cache return_dict output_attentions output_hidden_states tie_last_hidden_states
    keys_to_ignore_at_inference attn_implementation _attn_implementation _attn_implementation_autoset
    chunk_size_feed_forward is_llama_config transformers.js_config unsloth_fixed unsloth_version
    bos_token_id eos_token_id sep_token_id decoder_start_token_id tokenizer_class
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
    assistant_confidence_threshold bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature
    top_k top_p typical_p
""".split())

# Fields of which these values alone are without effect, and what to do about any other.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_dropout": ((0.0, None), "attention has no dropout here; set it to 0.0"),
    "pretraining_tp": ((1, None), "it only reorders sums; set it to 1"),
    "partial_rotary_factor": ((1.0, None), "these families rotate whole heads; remove it"),
    "per_layer_config": ((None, {}), "layers with configurations of their own are not supported"),
    "rope_interleaved": ((False, None), "only rotation by halves is supported"),
    "use_mrope": ((False, None), "multimodal positions belong to the vision families"),
    "is_causal": ((True, None), "attention is causal here"),
    "is_encoder_decoder": ((False, None), "this is a decoder"),
    "add_cross_attention": ((False, None), "this is a decoder"),
    "is_decoder": ((False, True, None), "this is a decoder"),
    "tie_encoder_decoder": ((False, None), "this is a decoder"),
    "pruned_heads": ((None, {}), "pruned heads are not supported"),
}

ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"})


def decode(cls: type[C], hf: dict, no_effect: Iterable[str] = (), **resolved: Any) -> C:
    """A family's `Config` from the dict of a config.json.

    `cls` has a field for each that is honoured, named as there (those of the rotary embedding together in `rope`);
    `resolved` are values worked out by the family; `no_effect` names fields that change nothing in it. Missing fields
    take the defaults of `cls`, which are those of transformers' class.

    Raises ValueError naming the field if it is unknown, of a value that is not supported, or of a wrong type.
    """
    family = hf.get("model_type") or cls.__module__.rpartition(".")[2]
    for name, (harmless, advice) in ONLY.items():
        if name in hf and hf[name] not in harmless:
            raise ValueError(f"{family} config: {name}={hf[name]!r} is not supported: {advice}")
    if not readable(hf.get("quantization_config")):
        raise ValueError(f"{family} config: quantization_config={hf['quantization_config']!r} is not supported: "
                         "float8 in blocks (quant_method fp8 with a weight_block_size and dynamic activations) and "
                         "mxfp4 are; save a dequantised checkpoint and load that")
    fields = {f.name for f in msgspec.structs.fields(cls)} - {"rope"}
    unknown = sorted(set(hf) - fields - NO_EFFECT - set(no_effect) - set(ONLY) - ROPE - {"quantization_config"})
    if unknown:
        raise ValueError(f"{family} config: unknown field {', '.join(unknown)}: it may change what the model "
                         "computes; if it does not, remove it from config.json")
    given = {name: hf[name] for name in fields if name in hf} | resolved
    try:
        cfg: Any = msgspec.convert(given, cls)                  # a Struct and a ModelConfig: no type says both
        cfg = msgspec.structs.replace(cfg, rope=decode_rope(hf, cfg.max_position_embeddings))
        check(cfg)
    except (msgspec.ValidationError, ValueError) as e:
        raise ValueError(f"{family} config: {str(e).replace('$.', '')}") from None
    return cfg


def readable(quantization: Any) -> bool:
    """Whether `xtf.hf.load` can dequantise what this quantization_config describes; None is what is not quantised.

    >>> readable({"quant_method": "mxfp4"}), readable({"quant_method": "gptq"})
    (True, False)
    """
    match quantization:
        case None | {"quant_method": "mxfp4"}:
            return True
        case {"quant_method": "fp8", "weight_block_size": [int(), int()]}:
            get = quantization.get
            return get("fmt", "e4m3") == "e4m3" and get("activation_scheme", "dynamic") == "dynamic"
    return False


def one_spelling(hf: dict, name: str, *others: str) -> dict:
    """The config with a field of several names under `name` alone. Raises ValueError where two of them differ.

    >>> one_spelling({"num_local_experts": 8}, "num_experts", "num_local_experts")
    {'num_experts': 8}
    """
    given = {field: hf[field] for field in (name, *others) if field in hf}
    if any(value != next(iter(given.values())) for value in given.values()):
        raise ValueError(f"{' and '.join(f'{k}={v!r}' for k, v in given.items())} are two names of one thing; remove "
                         "one of them")
    rest = {k: v for k, v in hf.items() if k not in given}
    return rest | ({name: next(iter(given.values()))} if given else {})


def decode_rope(hf: dict, max_position_embeddings: int) -> nn.AnyRope:
    """The rotary embedding, from whichever spelling there is.

    Raises ValueError if both are there and differ, or if a key is unknown, missing or of a wrong type.

    >>> decode_rope({"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2}}, 64)
    LinearRope(factor=2.0, rope_theta=5000.0)
    >>> decode_rope({"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2}}, 64)
    LinearRope(factor=2.0, rope_theta=5000.0)
    """
    found = [_rope(hf, spelling, max_position_embeddings)
             for spelling in ("rope_scaling", "rope_parameters") if hf.get(spelling)]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"rope_scaling says {found[0]} but rope_parameters {found[1]}; remove one of them")
    return (found or [_rope(hf, "rope_scaling", max_position_embeddings)])[0]


def _rope(hf: dict, spelling: str, max_position_embeddings: int) -> nn.AnyRope:
    # null means absent, save for truncate, where transformers takes it for False: its type is then refused
    given = {k: v for k, v in (hf.get(spelling) or {}).items() if v is not None or k == "truncate"}
    legacy = given.pop("type", "default")
    kind = given.setdefault("rope_type", legacy)
    if hf.get("rope_theta") is not None:
        given.setdefault("rope_theta", hf["rope_theta"])
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{spelling}.partial_rotary_factor is not supported: {ONLY['partial_rotary_factor'][1]}")
    if kind in ("yarn", "longrope", "llama3"):
        if hf.get("original_max_position_embeddings") is not None:      # where Phi3 has it: it wins, as in transformers
            given["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
        original = given.setdefault("original_max_position_embeddings", max_position_embeddings)
        if kind != "llama3" and isinstance(original, int) and original > 0:
            given.setdefault("factor", max_position_embeddings / original)
    if kind == "dynamic":
        given["max_position_embeddings"] = max_position_embeddings
    if kind == "yarn":                                                  # 0 means the default, as in transformers
        given = {k: v for k, v in given.items() if v or k not in ("beta_fast", "beta_slow")}
    try:
        return msgspec.convert(given, nn.AnyRope)
    except msgspec.ValidationError as e:
        kinds = "default, linear, dynamic, yarn, longrope, llama3"
        why = str(e).replace("$.", "")
        raise ValueError(f"{spelling} of rope_type {kind!r}: {why}; kinds supported are {kinds}") from None


def check(cfg: nn.ModelConfig) -> None:
    """Raise ValueError where fields do not fit each other."""
    if cfg.num_attention_heads % cfg.num_key_value_heads:
        raise ValueError(f"num_key_value_heads={cfg.num_key_value_heads} does not divide "
                         f"num_attention_heads={cfg.num_attention_heads}")
    if cfg.head_dim % 2:
        raise ValueError(f"head_dim={cfg.head_dim} is odd; rotary embeddings turn pairs of dims")
    if cfg.hidden_act not in nn.ACTIVATIONS:
        raise ValueError(f"hidden_act={cfg.hidden_act!r} is not supported; supported are {', '.join(nn.ACTIVATIONS)}")
    if cfg.pad_token_id is not None and not -cfg.vocab_size <= cfg.pad_token_id < cfg.vocab_size:
        raise ValueError(f"pad_token_id={cfg.pad_token_id} is outside the vocabulary of {cfg.vocab_size}; correct it "
                         "or remove it")
    router = getattr(cfg, "router", None)
    if router is not None and router.top_k > router.num_experts:
        raise ValueError(f"num_experts_per_tok={router.top_k} is more than there are experts, {router.num_experts}")
    if isinstance(cfg.rope, nn.LongRope):
        for name in ("short_factor", "long_factor"):
            if len(getattr(cfg.rope, name)) != cfg.head_dim // 2:
                raise ValueError(f"rope {name} has {len(getattr(cfg.rope, name))} entries; it needs head_dim / 2 = "
                                 f"{cfg.head_dim // 2}")


def default_head_dim(hf: dict, hidden_size: int, num_heads: int) -> Any:
    """`head_dim` if it is given, else hidden size over heads (raises ValueError if that is not whole)."""
    if hf.get("head_dim") is not None:
        return hf["head_dim"]
    hidden_size, num_heads = hf.get("hidden_size", hidden_size), hf.get("num_attention_heads", num_heads)
    if not isinstance(hidden_size, int) or not isinstance(num_heads, int) or num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"num_attention_heads={num_heads!r} does not divide hidden_size={hidden_size!r}; give "
                         "head_dim, or correct one of them")
    return hidden_size // num_heads


def num_kv_heads(hf: dict, missing: int | None, num_heads: int) -> Any:
    """`num_key_value_heads`; null, or missing where `missing` is None, means as many as there are query heads."""
    given = hf.get("num_key_value_heads", missing)
    return hf.get("num_attention_heads", num_heads) if given is None else given


def resolve_windows(cfg: W) -> W:
    """Windows as transformers resolves them: none unless `use_sliding_window`, by default from `max_window_layers` on.

    Raises ValueError as `layer_windows` does.
    """
    window = cfg.sliding_window if cfg.use_sliding_window else None
    types = cfg.layer_types
    if types is None:
        slides = lambda i: window is not None and i >= cfg.max_window_layers
        types = tuple("sliding_attention" if slides(i) else "full_attention" for i in range(cfg.num_hidden_layers))
    resolved = msgspec.structs.replace(cfg, sliding_window=window, layer_types=types)  # pyright: ignore
    layer_windows(resolved)
    return resolved


def layer_windows(cfg: LayerTypes) -> tuple[int | None, ...]:
    """For each layer how many tokens it sees, None where it sees the whole document.

    Raises ValueError at a type that is neither full_attention nor sliding_attention, at a list of the wrong length, and
    at a sliding layer without a window.
    """
    types = cfg.layer_types or ()
    if len(types) != cfg.num_hidden_layers:
        raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers={cfg.num_hidden_layers}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types has {kind!r}; supported are full_attention and sliding_attention")
        if kind == "sliding_attention" and cfg.sliding_window is None:
            raise ValueError("layer_types has sliding_attention but there is no window; set use_sliding_window=true "
                             "and sliding_window")
    return tuple(cfg.sliding_window if kind == "sliding_attention" else None for kind in types)
