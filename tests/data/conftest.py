"""A byte-level BPE tokenizer trained on the standard library's docstrings."""
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from xtf.data import stdlib_qa

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>",
           "<|end_of_text|>"]


@pytest.fixture(scope="session")
def docstrings():
    """(training, held-out) records."""
    return stdlib_qa.records()


@pytest.fixture(scope="session")
def make_tokenizer(docstrings):
    """(template, trim_offsets=False) -> a transformers tokenizer."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    # white space merges too
    texts = [m["content"] for part in docstrings for r in part for m in r["messages"]] + ["x\n\ny\n\n\nz   -"] * 200
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))

    def make(template, trim_offsets=False):
        copy = Tokenizer.from_str(core.to_str())
        copy.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        return PreTrainedTokenizerFast(tokenizer_object=copy, chat_template=template, eos_token="<|end_of_text|>",
                                       bos_token="<|begin|>", additional_special_tokens=SPECIAL)
    return make


@pytest.fixture
def write(tmp_path):
    """Write records (or raw bytes) as lines of a file; give its path."""
    def lines(*records, name="data.jsonl"):
        (tmp_path
         / name).write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
        return tmp_path / name
    return lines
