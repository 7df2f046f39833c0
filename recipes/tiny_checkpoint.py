"""Write a tiny random checkpoint of a family, its tokenizer trained on Python's docstrings: what recipes are tried on.

    python recipes/tiny_checkpoint.py qwen3_moe DIR
    python recipes/tiny_checkpoint.py deepseek_v3 DIR --config '{"num_hidden_layers": 4, "hidden_size": 128}'
"""
import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import xtf
from xtf import cli, hf, models
from xtf.data import stdlib_qa

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHARED = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2}
LATENT = SHARED | {"num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32,
                   "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
                   "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 16,
                   "qk_rope_head_dim": 8, "v_head_dim": 16, "norm_topk_prob": True}
CONFIGS = {
    "qwen3": SHARED | {"intermediate_size": 96, "head_dim": 16},
    "qwen3_moe": SHARED
    | {"intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
       "norm_topk_prob": True},
    "gpt_oss": SHARED
    | {"intermediate_size": 32, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 32,
       "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "deepseek_v3": LATENT
    | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1},
    "kimi_k2": LATENT | {"rope_theta": 50000.0, "num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1,
                         "routed_scaling_factor": 2.827},
}


def write(family: str, path: str | Path, changes: dict | None = None, seed: int = 0,
          like: str | Path | None = None) -> None:
    """A checkpoint of `family` with the config above and `changes` to it; weights in float32, drawn from `seed`; the
    tokenizer of the directory `like`, or a new one."""
    path = Path(path)
    hf_config = {"model_type": family, "dtype": "float32", **CONFIGS[family], **(changes or {})}
    module = models.FAMILIES[family]
    cfg = module.config(hf_config)
    hf.save(path, xtf.init(module.specs(cfg), seed), module.names(cfg))
    (path / "config.json").write_text(json.dumps(hf_config, indent=1))
    made = tokenizer(hf_config["vocab_size"]) if like is None else PreTrainedTokenizerFast.from_pretrained(like)
    made.save_pretrained(path)


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template, of at most `vocab_size` tokens."""
    records, _ = stdlib_qa.records()
    t = Tokenizer(BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator((m["content"] for r in records[:300] for m in r["messages"]), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=t, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    fast.chat_template = TEMPLATE
    return fast


def main(family: tyro.conf.Positional[Literal["qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "kimi_k2"]],
         path: tyro.conf.Positional[str], config: Annotated[str, tyro.conf.arg(help="JSON of fields to change")] = "{}",
         seed: int = 0) -> None:
    """Write a tiny random checkpoint."""
    torch.set_num_threads(1)
    write(family, path, json.loads(config), seed)
    print(f"{path}: a random {family}")


if __name__ == "__main__":
    cli.run(lambda: tyro.cli(main))
