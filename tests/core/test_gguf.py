"""GGUF in: tiny files written here with gguf's own writer, against the transformers models that their tensors came
from."""
import json

import gguf as ggml
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtf import gguf

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
TEXT = ["It's 2024, and  12 dogs ran; they'll RUN\n\n  again!", "naïve café – 北京 e\u0301", " a b", "don't 'S 1234567",
        "\t x\r\n"]
Q8, F16, F32, BF16 = (ggml.GGMLQuantizationType[n] for n in ("Q8_0", "F16", "F32", "BF16"))


def model(kind, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 128,
             "rms_norm_eps": 1e-5, "rope_theta": 5e4, "eos_token_id": 2, "bos_token_id": 1}
    config, cls = (getattr(transformers, kind.capitalize() + name) for name in ("Config", "ForCausalLM"))
    if kind == "qwen2":
        sizes["head_dim"] = 16  # its attention has hidden / heads whatever one says
    made = cls(config(**sizes | kwargs))
    for name, p in made.named_parameters():
        if "norm" in name or "bias" in name:                             # else ones and zeros, which hide mistakes
            torch.nn.init.normal_(p, float("norm" in name), 0.3)
        else:
            torch.nn.init.normal_(p, 0, 0.2)
    return made


def vocabulary(split=None):
    """Byte-level BPE trained on a few words: (tokens, merges, the trained tokenizer)."""
    tok = Tokenizer(BPE())
    tok.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(TEXT * 3, BpeTrainer(vocab_size=310, special_tokens=SPECIAL,
                                                 initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                                 show_progress=False))
    bpe = json.loads(tok.to_str())["model"]
    return sorted(bpe["vocab"], key=bpe["vocab"].get), [" ".join(m) for m in bpe["merges"]], tok


def interleave(w, heads):
    """Rows of each head: first half and second half by turns, as llama.cpp stores them."""
    first, second = w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 0, 2, *range(3, w.ndim + 2))
    return np.stack([first, second], 2).reshape(w.shape)


def write(path, made, types=(F32,), extra=(), pre="gpt-2", tokens=None, change=None):
    """`made` as a GGUF file; matrices take the given types in turn. Returns the values that the file holds, by Hugging
    Face name."""
    c, state, held = made.config, made.state_dict(), {}
    kind = c.model_type
    w = ggml.GGUFWriter(path, kind)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if kind != "qwen2":
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    names = ggml.get_tensor_name_map(ggml.MODEL_ARCH[kind.upper()], 2)
    for i, (name, x) in enumerate(state.items()):
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stored = names.get_name(name, (".weight", ".bias"))
        x = x.float().numpy()
        permuted = kind == "llama" and (".q_proj" in name or ".k_proj" in name)
        heads = c.num_attention_heads if ".q_proj" in name else c.num_key_value_heads
        type_ = types[i % len(types)] if x.ndim == 2 else F32
        data = ggml.quants.quantize(interleave(x, heads) if permuted else x, type_)
        w.add_tensor(stored, data, raw_dtype=type_)
        # rows are quantised one by one: their order is free
        held[name] = ggml.quants.dequantize(ggml.quants.quantize(x, type_), type_)
    for name, x in extra:
        w.add_tensor(name, x)
    tokens, merges, _ = tokens or vocabulary()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens + [f"[PAD{i}]" for i in range(len(tokens), 320)])
    w.add_token_types([3, 3, 3, 4] + [1] * (len(tokens) - 4) + [5] * (320 - len(tokens)))
    w.add_token_merges(merges)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(0)
    w.add_chat_template(TEMPLATE)
    if change:
        change(w)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return held


@pytest.mark.parametrize(("kind", "kwargs"), [
    ("llama", {"tie_word_embeddings": True}), ("llama", {"attention_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    ("qwen2", {"tie_word_embeddings": False}), ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
                                   "original_max_position_embeddings": 64}}),
])
def test_the_directory_is_the_model(tmp_path, kind, kwargs):
    """Bit for bit the values that the file holds, and the logits of the model with these values."""
    made = model(kind, **kwargs)
    rope = made.config.rope_parameters

    def scaling(w):
        if rope["rope_type"] != "default":
            w.add_rope_scaling_type(ggml.RopeScalingType(rope["rope_type"]))
            w.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    held = write(tmp_path / "m.gguf", made, types=(F32, F16, Q8, BF16), change=scaling)
    gguf.to_hf(tmp_path / "m.gguf", tmp_path / "out")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(got) is type(made) and got.dtype == torch.float32
    state = got.state_dict()
    assert all(np.array_equal(state[n].numpy(), x) for n, x in held.items())
    made.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in held.items()},
                         strict=not made.config.tie_word_embeddings)
    ids = torch.randint(320, (2, 100))
    torch.testing.assert_close(got(ids).logits, made(ids).logits, rtol=0, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["tie_word_embeddings"],
            config["pad_token_id"]) == (1e-5, made.config.tie_word_embeddings, 0)


def test_llama3_rope(tmp_path):
    """llama.cpp keeps one divisor a frequency; the parameters come back."""
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    made = model("llama", rope_parameters=rope, max_position_embeddings=131072)
    plain = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    divisors = (plain / made.model.rotary_emb.inv_freq).numpy()
    write(tmp_path / "m.gguf", made, extra=[("rope_freqs.weight", divisors)])
    gguf.to_hf(tmp_path / "m.gguf", tmp_path / "out", dtype=torch.bfloat16)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.config.rope_parameters == rope and got.dtype == torch.bfloat16
    assert torch.equal(got.model.rotary_emb.inv_freq, made.model.rotary_emb.inv_freq)
    write(tmp_path / "odd.gguf", made, extra=[("rope_freqs.weight", divisors ** 2)])
    with pytest.raises(ValueError, match=r"odd\.gguf: rope_freqs\.weight is not llama 3's"):
        gguf.to_hf(tmp_path / "odd.gguf", tmp_path / "out")


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_tokenizer(tmp_path, pre):
    """The same ids as the tokenizer that the vocabulary was trained with, read back by AutoTokenizer; specials stay
    whole."""
    parts = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
             "qwen2": [pre_tokenizers.Split(Regex(QWEN), "isolated")],
             "llama-bpe": [pre_tokenizers.Split(Regex(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated")]}[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    split = pre_tokenizers.Sequence([*parts, byte_level])
    trained = vocabulary(split)
    write(tmp_path / "m.gguf", model("llama"), pre=pre, tokens=trained)
    gguf.to_hf(tmp_path / "m.gguf", tmp_path / "out")
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    start = [1] if pre == "llama-bpe" else []                            # llama 3 begins every text with its bos
    for text in TEXT:
        ids = tok(text).input_ids
        if pre == "qwen2" and text.startswith("na"):
            text = "naïve café – 北京 é"                                         # qwen2 composes accents
        assert ids == start + trained[2].encode(text).ids
        assert tok.decode(ids[len(start):]) == text
    assert tok("<|im_start|>a<think>", add_special_tokens=False).input_ids == [1, *trained[2].encode("a").ids, 3]
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert len(tok) == len(trained[0])
    chat = tok.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_llama3_takes_whole_words_without_merges(tmp_path):
    """Llama 3's vocabulary has words that its merges do not lead to; they are taken all the same, and gpt-2's are
    not."""
    tokens, merges, trained = vocabulary()
    for pre, expected in (("llama-bpe", [1, len(tokens)]), ("gpt-2", trained.encode("zebra").ids)):
        write(tmp_path / "m.gguf", model("llama"), pre=pre, tokens=([*tokens, "zebra"], merges, trained))
        gguf.to_hf(tmp_path / "m.gguf", tmp_path / pre)
        assert AutoTokenizer.from_pretrained(tmp_path / pre)("zebra").input_ids == expected


def test_sentencepiece_tokenizer(tmp_path):
    """A vocabulary of the llama kind goes through transformers' own conversion; merges follow the scores."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", "ab", "▁ab", "a", "b", "▁"]

    def sentencepiece(w):
        for key in ("model", "tokens", "token_type", "merges", "pre"):
            del w.kv_data[0][f"tokenizer.ggml.{key}"]
        w.add_tokenizer_model("llama")
        w.add_token_list(pieces)
        w.add_token_types([2, 3, 3] + [6] * 256 + [1] * 6)
        w.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    write(tmp_path / "m.gguf", model("llama"), change=sentencepiece)
    gguf.to_hf(tmp_path / "m.gguf", tmp_path / "out")
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tok.convert_ids_to_tokens(tok("ab abb", add_special_tokens=False).input_ids) == ["▁ab", "▁ab", "b"]
    assert tok.decode(tok("ab é b", add_special_tokens=False).input_ids) == "ab é b"
    assert tok.chat_template == TEMPLATE


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_corrupt_files_are_named(tmp_path):
    write(tmp_path / "m.gguf", model("llama"))
    whole = (tmp_path / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    wrong_counts = [whole[:i] + b"\xff" * 8 + whole[i + 8:] for i in (8, 16)]    # of tensors, of fields
    for data in (b"", b"GGUF", b"not a model at all" * 9, whole[:3000], whole[:-1000], *wrong_counts):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.gguf: not a GGUF file, or corrupt or truncated"):
            gguf.to_hf(bad, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf: no such file"):
        gguf.to_hf(tmp_path / "gone.gguf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.gguf", "m.gguf"]


def drop(key):
    return lambda w: w.kv_data[0].pop(key)


def put(key, value):
    return lambda w: setattr(w.kv_data[0][key], "value", value)


def tensor(name):
    return lambda w: w.tensors[0].pop(name)


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.add_uint32("llama.expert_count", 8), "not supported: llama.expert_count = 8"),
    (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), r"rope\.scaling\.type = longrope is not supported"),
    (put("llama.rope.dimension_count", 8), "rope.dimension_count differs from the head dim, 32"),
    (put("general.architecture", "mamba"), "architecture mamba is not supported"),
    (put("tokenizer.ggml.pre", "poro-chat"), r"tokenizer\.ggml\.pre = poro-chat is not supported"),
    (put("tokenizer.ggml.model", "bert"), "tokenizer bert is not supported"),
    (put("tokenizer.ggml.eos_token_id", 999), "tokenizer's fields do not fit together"),
    (drop("llama.block_count"), r"field llama\.block_count is missing"),
    (tensor("blk.1.attn_k.weight"), r"missing: \['blk\.1\.attn_k\.weight'\]"),
    (tensor("token_embd.weight"), r"tensor token_embd\.weight is missing"),
    (lambda w: w.add_tensor("blk.0.ffn_gate.bias", np.zeros(96, np.float32)), r"extra: \['blk\.0\.ffn_gate\.bias'\]"),
])
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    write(tmp_path / "m.gguf", model("llama"), change=change)
    with pytest.raises(ValueError, match=message) as e:
        gguf.to_hf(tmp_path / "m.gguf", tmp_path / "out")
    assert "m.gguf" in str(e.value) and not (tmp_path / "out").exists()


def test_per_layer_heads_are_refused(tmp_path):
    def change(w):
        del w.kv_data[0]["llama.attention.head_count_kv"]
        w.add_head_count_kv([2, 1])
    write(tmp_path / "m.gguf", model("llama"), change=change)
    with pytest.raises(ValueError, match=r"llama\.attention\.head_count_kv differs by layer"):
        gguf.to_hf(tmp_path / "m.gguf", tmp_path / "out")
