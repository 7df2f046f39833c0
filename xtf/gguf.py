"""GGUF in: one quantised file becomes a Hugging Face directory that transformers (and xtf) load.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What a file says and this module does not know is
refused by name.
"""
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xtf.hf import safetensors as files

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}
BLOCK = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
WITHOUT_EFFECT = {"vocab_size"}                                          # the embedding's rows say it
# How text is split before its bytes are merged; the expressions are those the models were trained with, by
# `tokenizer.ggml.pre`.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2, SMOLLM = {None, "default", "gpt-2"}, {"smollm"}
QWEN2, LLAMA3 = {"qwen2", "deepseek-r1-qwen"}, {"llama-bpe", "llama3", "llama-v3"}


def to_hf(gguf_file: str | Path, out_dir: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Convert a GGUF file (llama, qwen2, qwen3; any quantisation the gguf package reads) to a Hugging Face directory.

    Writes config.json, generation_config.json, model.safetensors in `dtype`, the tokenizer and its chat template; one
    tensor is in memory at a time. Vectors and matrices are [out, in], with llama's query and key rows in Hugging Face's
    order.

    Raises ValueError naming the file where it is corrupt or says something that is not supported; FileExistsError and
    OSError as `xtf.hf.save`.

        xtf.gguf.to_hf("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")
        transformers.AutoModelForCausalLM.from_pretrained("smollm2")
    """
    source, path = Path(gguf_file), Path(out_dir).resolve()
    fields, tensors = _read(source)
    config = _config(source, fields, tensors)
    names = _names(source, config, tensors)
    try:
        tokenizer = _tokenizer(source, fields)
    except (IndexError, TypeError, KeyError) as e:
        raise ValueError(f"{source}: the tokenizer's fields do not fit together ({type(e).__name__}: {e}); fetch the "
                         "file again") from e
    shapes = {hf: (dtype, tuple(int(n) for n in reversed(tensors[name].shape))) for name, hf in names.items()}
    shards = files.assign({n: dtype.itemsize * int(np.prod(shape)) for n, (_, shape) in shapes.items()}, 5 << 30)
    entries, headers = files.lay_out(files.partial(path), shapes, shards)
    try:
        work = files.begin(path)
        files.create(entries, headers)
        for file in headers:
            with files.writing(file) as fd:
                for name, hf in names.items():
                    if entries[hf].file == file:
                        values = torch.from_numpy(_values(source, name, tensors[name], config))
                        files.write(fd, entries[hf], (0,) * values.ndim, values)
        ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
        for file, content in (("config.json", config | {"dtype": str(dtype).removeprefix("torch.")}),
                              ("generation_config.json", ids)):
            (work / file).write_text(json.dumps(content, indent=2) + "\n")
        tokenizer.save_pretrained(work)
        files.finish(path)
    except BaseException:
        shutil.rmtree(files.partial(path), ignore_errors=True)
        raise


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, tensors by name); the reader trusts any length it finds, so what it raises means a corrupt file."""
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give a .gguf file")
    try:
        reader = GGUFReader(source)
        return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}
    except Exception as e:
        raise ValueError(f"{source}: not a GGUF file, or corrupt or truncated ({type(e).__name__}: {e}); "
                         "fetch it again") from e


def _config(source: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{source}: architecture {architecture} is not supported (supported: "
                         f"{', '.join(ARCHITECTURES)})")
    own = {k.removeprefix(f"{architecture}."): _shortest(v) for k, v in fields.items()
           if k.startswith(f"{architecture}.")}

    def take(key: str, *default: Any) -> Any:
        if key not in own and not default:
            raise ValueError(f"{source}: field {architecture}.{key} is missing; the file is not a complete "
                             f"{architecture} model")
        value = own.pop(key, *default)
        if isinstance(value, list):
            raise ValueError(f"{source}: {architecture}.{key} differs by layer: not supported")
        return value

    heads, hidden = take("attention.head_count"), take("embedding_length")
    head_dim = take("attention.key_length", None) or hidden // heads
    config = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture, "hidden_size": hidden,
              "intermediate_size": take("feed_forward_length"), "num_hidden_layers": take("block_count"),
              "num_attention_heads": heads,
              "num_key_value_heads": take("attention.head_count_kv", heads), "head_dim": head_dim, "hidden_act": "silu",
              "max_position_embeddings": take("context_length"),
              "rms_norm_eps": take("attention.layer_norm_rms_epsilon"),
              "rope_theta": take("rope.freq_base", 10000.0),
              "vocab_size": int(_tensor(source, tensors, "token_embd.weight").shape[1]),
              "tie_word_embeddings": "output.weight" not in tensors, "use_cache": True}
    for key, expected in (("rope.dimension_count", head_dim), ("attention.value_length", head_dim)):
        if take(key, expected) != expected:
            raise ValueError(f"{source}: {architecture}.{key} differs from the head dim, {head_dim}: not supported")
    if architecture != "qwen2":                                          # qwen2 always has biases, on q, k and v
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if scaling := _rope_scaling(source, config, take, tensors):
        config["rope_scaling"] = scaling
    if unknown := sorted(own.keys() - WITHOUT_EFFECT):
        raise ValueError(f"{source}: not supported: " + ", ".join(f"{architecture}.{k} = {own[k]}" for k in unknown))
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    if (turn := fields.get("tokenizer.ggml.eot_token_id")) not in (None, config.get("eos_token_id")):
        config["eos_token_id"] = [config["eos_token_id"], turn] if "eos_token_id" in config else turn
    return config


def _shortest(value: Any) -> Any:
    """GGUF holds float32: 1e-05 comes as 9.999999747378752e-06. The shortest number of that float32 was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(source: Path, config: Mapping[str, Any], take: Any,
                  tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = take("rope.scaling.type", "none")
    factor, original = take("rope.scaling.factor", 1.0), take("rope.scaling.original_context_length", None)
    take("rope.scaling.finetuned", None)                                 # says how the model came about
    if "rope_freqs.weight" in tensors:                                   # llama 3 stores the divisor of each frequency
        return _llama3_scaling(source, config,
                               dequantize(tensors["rope_freqs.weight"].data, tensors["rope_freqs.weight"].tensor_type))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{source}: rope.scaling.type = {kind} is not supported (supported: none, linear, yarn)")
    return {"rope_type": kind, "factor": factor} | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(source: Path, config: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """The parameters of llama 3's table of divisors, checked by making it again (Llama 3.1: 8192, 1 and 4)."""
    low, high, original, factor = 1.0, 4.0, 8192, _shortest(float(divisors.max()))
    dim = config["head_dim"]
    # within the original context
    turns = original * config["rope_theta"] ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    if divisors.shape != share.shape or not np.allclose(divisors, 1 / (share + (1 - share) / factor), rtol=1e-4):
        raise ValueError(f"{source}: rope_freqs.weight is not llama 3's for factor {factor}, low 1, high 4, "
                         f"{original} positions: not supported")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original}


def _names(source: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor that the config asks for; the file must have just these."""
    kind = config["model_type"]
    parts = [f"{p}.weight" for p in BLOCK if kind == "qwen3" or p not in ("attn_q_norm", "attn_k_norm")]
    if config.get("attention_bias", True):
        parts += [f"{p}.bias" for p in ("attn_q", "attn_k", "attn_v", "attn_output")
                  if kind != "qwen2" or p != "attn_output"]
    names = {g: h for g, h in TOP.items() if g != "output.weight" or not config["tie_word_embeddings"]}
    for i in range(config["num_hidden_layers"]):
        for part in parts:
            name, suffix = part.rsplit(".", 1)
            names[f"blk.{i}.{part}"] = f"model.layers.{i}.{BLOCK[name]}.{suffix}"
    missing = [n for n in names if n not in tensors]
    extra = sorted(tensors.keys() - names.keys() - {"rope_freqs.weight"})
    if missing or extra:
        raise ValueError(f"{source}: the tensors are not those of a {kind} of {config['num_hidden_layers']} layers; "
                         f"missing: {missing}; extra: {extra}")
    return names


def _tensor(source: Path, tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise ValueError(f"{source}: tensor {name} is missing; the file is not a complete model")
    return tensors[name]


def _values(source: Path, name: str, tensor: Any, config: Mapping[str, Any]) -> np.ndarray:
    try:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)  # a copy, out of the memory map
    except NotImplementedError as e:
        raise ValueError(f"{source}: tensor {name} is {tensor.tensor_type.name}, which the gguf package cannot "
                         "dequantise; convert it first") from e
    if config["model_type"] == "llama" and (match := re.search(r"\.attn_([qk])\.", name)):
        # llama.cpp rotates neighbours where transformers rotates halves, and so stores each head's rows interleaved.
        heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values


def _tokenizer(source: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items() if k.startswith("tokenizer.ggml.")}
    kind, template = ggml.get("model"), fields.get("tokenizer.chat_template")
    if kind == "llama":  # sentencepiece: transformers rebuilds it faithfully
        return AutoTokenizer.from_pretrained(str(source.resolve().parent), gguf_file=source.name)
    if kind != "gpt2" or not {"tokens", "merges"} <= ggml.keys():
        raise ValueError(f"{source}: tokenizer {kind} is not supported, or its tokens or merges are missing "
                         "(supported: gpt2, llama)")
    special = {f"{name}_token": ggml["tokens"][ggml[f"{key}_token_id"]] for name, key in
               (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")) if f"{key}_token_id" in ggml}
    tokenizer = _byte_level(source, ggml)
    if ggml.get("add_bos_token", ggml.get("pre") in LLAMA3) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                                                 special_tokens=[(bos, ggml["bos_token_id"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template,
                                   clean_up_tokenization_spaces=False,
                                   model_max_length=next(v for k, v in fields.items() if k.endswith(".context_length")),
                                   **special)


def _byte_level(source: Path, ggml: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE with the splitting of the model's family, which no GGUF carries."""
    pre = ggml.get("pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(ggml.get("add_space_prefix", False)),
                                          use_regex=pre in GPT2 | SMOLLM)
    if pre in GPT2:
        split = byte_level
    elif pre in SMOLLM:
        split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif pre in QWEN2 | LLAMA3:
        words = Regex(WORDS % ("{1,3}" if pre in LLAMA3 else ""))
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="isolated"), byte_level])
    else:
        known = ", ".join(sorted(map(str, GPT2 | SMOLLM | QWEN2 | LLAMA3)))
        raise ValueError(f"{source}: tokenizer.ggml.pre = {pre} is not supported (supported: {known})")
    types = ggml.get("token_type") or [TokenType.NORMAL] * len(ggml["tokens"])
    kept = [(i, t, k) for i, (t, k) in enumerate(zip(ggml["tokens"], types, strict=True))
            if not (k == TokenType.UNUSED and re.fullmatch(r"\[PAD\d+\]", t))]  # fill the embedding's last rows
    merges = [tuple(m.split(" ")) for m in ggml["merges"]]
    bpe = BPE(vocab={t: i for i, t, _ in kept}, merges=merges, ignore_merges=pre in LLAMA3)  # type: ignore[arg-type]
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = split  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if pre in QWEN2:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    for type_ in (TokenType.CONTROL, TokenType.USER_DEFINED):
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=type_ == TokenType.CONTROL)
                              for _, t, k in kept if k == type_])
    return tokenizer
