"""A model's tokenizer, checked before anything is trained with it; character offsets for those that have none.

n: tokens.
"""
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock


def load(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory or hub id: transformers', with `offset_mapping`, and whose added tokens survive.

    `trust_remote_code` runs the tokenizer's own code where the directory brings some (Kimi K2); never otherwise. All
    ranks of a machine may call this at once.

    Raises ValueError naming the directory where it has no tokenizer that loads, where its tokenizer is code and that is
    not trusted, and naming the token where an added token is not encoded as its id alone, or that id is not decoded as
    the token.

    >>> import tempfile, tokenizers, transformers
    >>> path = tempfile.mkdtemp()
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "<eos>": 1}, "<eos>"))
    >>> _ = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)
    >>> load(path)("hello<eos>")["input_ids"]
    [0, 1]
    """
    from transformers import AutoTokenizer, dynamic_module_utils

    copies = Path(dynamic_module_utils.HF_MODULES_CACHE)
    try:
        if not trust_remote_code:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        else:
            copies.mkdir(parents=True, exist_ok=True)
            with FileLock(copies / "xtf.lock"):  # transformers copies the code here: another rank may be importing it
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    except Exception as e:                                        # remote code raises what it likes
        if not trust_remote_code and (code := _own_code(path)):
            raise ValueError(f"{path}: its tokenizer is code of its own, {code}; read it, and pass "
                             "--trust-remote-code to run it") from e
        raise ValueError(f"{path}: the tokenizer does not load: {type(e).__name__}: {e}") from e
    check_added_tokens(tokenizer, path)
    return tokenizer if tokenizer.is_fast else WithOffsets(tokenizer, path)


def _own_code(path: str | Path) -> str | None:
    """The tokenizer class that the directory's own code defines."""
    for name in ("tokenizer_config.json", "config.json"):
        file = Path(path) / name
        auto_map = json.loads(file.read_text()).get("auto_map") if file.is_file() else None
        classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        if classes:
            return next(filter(None, classes)) if isinstance(classes, list) else str(classes)
    return None


def check_added_tokens(tokenizer: Any, path: str | Path) -> None:
    """Raise ValueError, naming the first, where an added token does not survive a round trip (text, one id, text)."""
    added = {i: str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
    known = set(added.values())
    added |= {tokenizer.convert_tokens_to_ids(token): token for token in tokenizer.all_special_tokens
              if token not in known}
    broken = []
    for i, token in added.items():
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        text = ""
        if i is not None:
            text = tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if ids != [i] or text != token:
            broken.append(f"{token!r} (id {i}) is encoded as {ids}, and its id is decoded as {text!r}")
    if broken:
        rest = f", and {len(broken) - 1} more like it" if len(broken) > 1 else ""
        raise ValueError(f"{path}: the added token {broken[0]}{rest}: what the model would be trained on is not what "
                         "is written; correct tokenizer_config.json and tokenizer.json, or install the release of "
                         "transformers that they were written for")


class WithOffsets:
    """A slow byte-level tokenizer with the `offset_mapping` of fast ones: each token's [first, last + 1) character.

    Everything else is the tokenizer's. It is pickled as the directory that it came from, since its class is known to no
    other process. Raises ValueError, when it is called for offsets, if the tokens do not spell the text.

    >>> spans([b"a", b"\\xc3", b"\\xa9!"], "a\\u00e9!")                      # the second character is cut in two
    [(0, 1), (1, 2), (1, 3)]
    """
    gives_offsets = True

    def __init__(self, tokenizer: Any, path: str | Path):
        self.tokenizer, self.path = tokenizer, path
        self._bytes = cache(self._bytes)

    def __reduce__(self) -> tuple:
        return load, (self.path, True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        out = self.tokenizer(text, *args, **kwargs)
        if return_offsets_mapping:
            of, ids = lambda text, ids: spans([self._bytes(i) for i in ids], text), out["input_ids"]
            out["offset_mapping"] = of(text, ids) if isinstance(text, str) else list(map(of, text, ids))
        return out

    def _bytes(self, i: int) -> bytes:
        """What a token stands for: byte-level tokens have a printable character for each byte, as in GPT-2."""
        added, token = self.tokenizer.added_tokens_decoder.get(i), str(self.tokenizer.convert_ids_to_tokens(i))
        if added is None and all(c in BYTES for c in token):
            return bytes(BYTES[c] for c in token)
        return str(token if added is None else added.content).encode()


def spans(tokens: list[bytes], text: str) -> list[tuple[int, int]]:
    """For each token the characters of `text` that its bytes are part of. Raises ValueError if they do not spell it."""
    data = text.encode()
    if b"".join(tokens) != data:
        raise ValueError(f"the tokenizer's tokens spell {b''.join(tokens)[:80]!r}, not the text {data[:80]!r}, so it "
                         "cannot tell which of them carry loss in a conversation; give a fast tokenizer "
                         "(tokenizer.json), or text")
    char_of_byte = (np.frombuffer(data, np.uint8) & 0xC0 != 0x80).cumsum() - 1  # bytes 10xxxxxx continue a character
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    starts = ends - [len(token) for token in tokens]
    return [(int(char_of_byte[a]), int(char_of_byte[b - 1]) + 1) for a, b in zip(starts, ends, strict=True)]


def _byte_characters() -> dict[str, int]:
    """GPT-2's character for each byte, the other way: itself where it is printable, else what follows U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTES = _byte_characters()
