"""Tokenizers of directories: remote code only when it is trusted, added tokens that survive, offsets for slow ones."""
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import dynamic_module_utils

from xtf.data import tokenizer as T
from xtf.data.chat import Encoder

CODE = '''
from transformers import PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


class ToyTokenizer(PreTrainedTokenizer):
    """Bytes, and pairs of letters: slow, byte-level, from code of its own, as Kimi's is."""
    vocab_files_names = {}
    model_input_names = ["input_ids"]

    def __init__(self, **kwargs):
        self.char = bytes_to_unicode()
        pairs = [a + b for a in "abcdehlmnoprstu" for b in "abcdehlmnoprstu"]
        self.ids = {token: i for i, token in enumerate([*(self.char[b] for b in range(256)), *pairs])}
        self.tokens = {i: token for token, i in self.ids.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.ids)

    def get_vocab(self):
        return self.ids | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        chars, out = [self.char[b] for b in text.encode()], []
        while chars:
            take = 2 if "".join(chars[:2]) in self.ids else 1
            out.append("".join(chars[:take]))
            chars = chars[take:]
        return out

    def _convert_token_to_id(self, token):
        return self.ids.get(token)

    def _convert_id_to_token(self, index):
        return self.tokens.get(index)

    def convert_tokens_to_string(self, tokens):
        back = {c: b for b, c in self.char.items()}
        of = lambda t: [back[c] for c in t] if t in self.ids else t.encode()
        return bytes(b for t in tokens for b in of(t)).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
'''
SPECIAL = ["<|im_user|>", "<|im_assistant|>", "<|im_end|>", "[EOS]"]
FIRST = 256 + 15 * 15
TEMPLATE = ("{% for m in messages %}<|im_{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_assistant|>{% endif %}")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory as Kimi K2's: config.json and tokenizer_config.json that point at code."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "kimi"
    folder.mkdir()
    (folder / "tokenization_toy.py").write_text(CODE)
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k2",
                                                    "auto_map": {"AutoConfig": "configuration_missing.Config"}}))
    write(folder)
    return folder


def write(folder, **options):
    added = {str(FIRST + i): {"content": t, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                              "single_word": False}
             for i, t in enumerate(SPECIAL)}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "ToyTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_toy.ToyTokenizer", None]},
        "added_tokens_decoder": added,
        "eos_token": "[EOS]", "chat_template": TEMPLATE} | options))


def test_code_runs_only_when_it_is_trusted(directory):
    with pytest.raises(ValueError,
                       match=r"kimi: its tokenizer is code of its own, "
                             r"tokenization_toy\.ToyTokenizer.*--trust-remote-code"):
        T.load(directory)
    assert not list(directory.parent.glob("modules/**/*.py"))
    tokenizer = T.load(directory, trust_remote_code=True)
    assert tokenizer("hello é<|im_end|>")["input_ids"][-1] == FIRST + 2 and tokenizer.eos_token_id == FIRST + 3


def test_code_that_fails_says_so(directory):
    (directory / "tokenization_toy.py").write_text("import no_such_module_here\n")
    with pytest.raises(ValueError, match=r"kimi: the tokenizer does not load: ImportError: .*no_such_module_here"):
        T.load(directory, trust_remote_code=True)
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="kimi: the tokenizer does not load"):
        T.load(directory)


@pytest.mark.parametrize("old, new, message", [
    ("bytes(b for t in tokens", "bytes(b for t in tokens if t not in self.added_tokens_encoder",
     r"encoded as \[481\].*decoded as ''"),
    ("def _tokenize(", "def tokenize(self, text, **kwargs):\n        return self._tokenize(text)\n\n    def _tokenize(",
     r"encoded as \[60, 124"),
])
def test_an_added_token_that_does_not_survive_is_named(directory, old, new, message):
    assert old in CODE
    (directory / "tokenization_toy.py").write_text(CODE.replace(old, new))
    with pytest.raises(ValueError,
                       match=rf"kimi: the added token '<\|im_user\|>' \(id {FIRST}\) is {message}.* "
                             "and 3 more like it"):
        T.load(directory, trust_remote_code=True)


def test_fast_tokenizers_are_checked_too(make_tokenizer, tmp_path):
    fast = make_tokenizer(TEMPLATE)
    fast.save_pretrained(tmp_path / "fast")
    loaded = T.load(tmp_path / "fast")
    assert loaded.is_fast and loaded("hello").input_ids == fast("hello").input_ids
    fast.backend_tokenizer.decoder = decoders.Replace("<|im_", "(")
    fast.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError,
                       match=r"broken: the added token '<\|im_start\|>' \(id 0\).*decoded as '\(start\|>'.* "
                             "and 1 more"):
        T.load(tmp_path / "broken")


@given(drawn=st.text(st.sampled_from("ab \n\té日本🙂e\u0301<|im_end>"), max_size=30) | st.text(max_size=20))
def test_offsets_are_those_of_fast_tokenizers(make_tokenizer, drawn):
    """The same tokens through `tokenizers`, which keeps count as it goes; also where a character is cut, and with
    control tokens."""
    fast = make_tokenizer(TEMPLATE)
    for text in (drawn, drawn + "<|im_end|>" + drawn):
        want = fast(text, return_offsets_mapping=True, add_special_tokens=False)
        got = T.WithOffsets(fast, ".")(text, return_offsets_mapping=True, add_special_tokens=False)
        assert (got["input_ids"], got["offset_mapping"]) == (want["input_ids"], want["offset_mapping"])
        assert T.WithOffsets(fast, ".")([text],
                                        return_offsets_mapping=True)["offset_mapping"] == [want["offset_mapping"]]


def test_conversations_carry_loss_on_what_the_assistant_says(directory):
    """A slow tokenizer of its own code, through the encoder, pickled on the way as to another process."""
    tokenizer = T.load(directory, trust_remote_code=True)
    encoder = pickle.loads(pickle.dumps(Encoder(tokenizer)))
    messages = [{"role": "user", "content": "ça va?"}, {"role": "assistant", "content": "très bien 🙂"},
                {"role": "user", "content": "ok"}, {"role": "assistant", "content": "an answer"}]
    (sample,) = encoder({"messages": messages})
    assert tokenizer.decode(sample.ids) == "".join(f"<|im_{m['role']}|>{m['content']}<|im_end|>" for m in messages)
    assert tokenizer.decode(sample.ids[np.asarray(sample.mask)]) == "très bien 🙂<|im_end|>an answer<|im_end|>"
    with pytest.raises(ValueError, match="spell b'a', not the text b'b'"):
        T.spans([b"a"], "b")
