"""JSONL in, tokens with a loss mask out: the loss falls on what inference would have generated.

A line is one of {"messages": [...]} (OpenAI; "tools" is passed to the template), {"text": "..."} (loss on everything, end token appended), or
{"input_ids": [...], "labels": [...]} (as in transformers: unshifted, -100 where masked; without labels, loss on everything).

n: tokens of one sample. A span is a pair of character offsets.
"""
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch

from xtf.data.batch import Sample

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMATS = ("messages", "text", "input_ids")
Span = tuple[int, int]
Encoded = tuple[np.ndarray, np.ndarray]  # ids int64 [n], mask bool [n]


class BadLine(ValueError):
    """A line of a data file that cannot be trained on: `file`, `line` (from 1) and `reason`."""

    def __init__(self, file: str, line: int, reason: str):
        super().__init__(f'{file}:{line}: {reason} (mend the line, or read with on_bad="skip")')
        self.file, self.line, self.reason = file, line, reason


@dataclass
class Stats:
    """What became of the lines: nothing is left out without being counted here.

    >>> print(Stats(lines=2, samples=2, tokens=90, loss_tokens=40, truncated=1, tokens_dropped=8))
    2 samples of 2 lines, 90 tokens, 40 with loss; 1 truncated (8 tokens dropped)
    """
    lines: int = 0
    bad: int = 0              # lines skipped; the first few reasons are in bad_lines
    samples: int = 0
    tokens: int = 0           # in the samples kept
    loss_tokens: int = 0      # of those, the predicted ones
    truncated: int = 0        # samples cut to seq_len ...
    tokens_dropped: int = 0   # ... and the tokens cut off
    without_loss: int = 0     # samples dropped because no token in them carries loss
    straddling: int = 0       # turns whose first characters belong to a token that begins in the prompt, which is not trained
    bad_lines: list[BadLine] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.samples:,} samples of {self.lines:,} lines, {self.tokens:,} tokens, {self.loss_tokens:,} with loss"
        text += f"; {self.truncated:,} truncated ({self.tokens_dropped:,} tokens dropped)" if self.truncated else ""
        text += f"; {self.without_loss:,} dropped without a token that carries loss" if self.without_loss else ""
        text += f"; {self.straddling:,} turns begin inside a token of their prompt" if self.straddling else ""
        text += f"; {self.bad:,} bad lines skipped: " + "; ".join(map(str, self.bad_lines)) if self.bad else ""
        return text


class _Bad(Exception):
    """Why a record cannot be used; becomes a BadLine where file and line are known."""


@dataclass(frozen=True)
class _Reading:
    tokenizer: Any
    everything: bool
    special: list[int]  # ids of special tokens: the last one of a turn ends it
    stats: Stats


def read_samples(files: str | PathLike | Sequence[str | PathLike], tokenizer: Any, seq_len: int, *, train_on_everything: bool = False,
                 on_bad: str = "raise", vocab_size: int | None = None) -> tuple[list[Sample], Stats]:
    """The samples of one or several JSONL files, and what was dropped on the way.

    Samples hold ids int64 [n] and mask bool [n], 2 <= n <= seq_len. Longer ones keep their first seq_len tokens. In a conversation
    the assistant's turns carry loss, up to and including the token that ends the turn: by the template's `{% generation %}` marks if it has them,
    else by rendering what precedes each turn. Where the template renders a turn differently once others follow (Qwen3
    drops earlier reasoning), each assistant turn becomes a sample of its own, rendered as it was when it was generated.

    Args:
        tokenizer: a fast transformers tokenizer, with a chat template if there are conversations; None will do for input_ids.
        train_on_everything: every token carries loss, whatever the format.
        on_bad: "raise" stops at the first bad line; "skip" counts and reports it in the stats.
        vocab_size: the model's, if known: ids beyond it make a line bad.

    Raises BadLine, naming file, line and reason; ValueError if a conversation meets a tokenizer without template or offsets.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "data.jsonl"
    ...     _ = file.write_text('{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}')
    ...     samples, stats = read_samples(file, None, seq_len=2)
    >>> samples[0].ids.tolist(), samples[0].mask.tolist(), stats.tokens_dropped
    ([5, 6], [False, True], 1)
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f'on_bad={on_bad!r} is neither "raise" nor "skip"')
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: predicting a token takes at least 2")
    stats, samples = Stats(), []
    special = [i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special]
    at = _Reading(tokenizer, train_on_everything, special, stats)
    for file in [files] if isinstance(files, str | PathLike) else files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                stats.lines += 1
                try:
                    encoded = list(_encode(_parse(line), at))
                    for ids, _ in encoded:
                        _check_ids(ids, vocab_size)
                except _Bad as e:
                    bad = BadLine(fspath(file), number, str(e))
                    if on_bad == "raise":
                        raise bad from e
                    stats.bad += 1
                    stats.bad_lines += [bad] if len(stats.bad_lines) < 5 else []
                    continue
                samples += [s for ids, mask in encoded if (s := _sample(ids, mask, stats.lines - 1, seq_len, stats))]
    return samples, stats


def _sample(ids: np.ndarray, mask: np.ndarray, source: int, seq_len: int, stats: Stats) -> Sample | None:
    stats.truncated += len(ids) > seq_len
    stats.tokens_dropped += max(0, len(ids) - seq_len)
    ids, mask = ids[:seq_len].copy(), mask[:seq_len].copy()
    mask[:1] = False  # nothing predicts the first token
    if not mask.any():
        stats.without_loss += 1
        return None
    stats.samples, stats.tokens, stats.loss_tokens = stats.samples + 1, stats.tokens + len(ids), stats.loss_tokens + int(mask.sum())
    return Sample(torch.from_numpy(ids), torch.from_numpy(mask), source)


def _check_ids(ids: np.ndarray, vocab_size: int | None) -> None:
    if not len(ids):
        raise _Bad("no tokens at all")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise _Bad(f"token id {low if low < 0 else high} is outside the vocabulary" + (f" of {vocab_size}" if vocab_size else ""))


def _parse(line: bytes) -> dict[str, Any]:
    """The record of one line, with its outermost shape checked."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise _Bad(f"not UTF-8: {e.reason} at byte {e.start}") from e
    if not text.strip():
        raise _Bad("empty line")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _Bad(f"broken JSON: {e}") from e
    if not isinstance(record, dict):
        raise _Bad(f"a JSON {type(record).__name__} where an object was expected")
    found = [f for f in FORMATS if f in record]
    if len(found) != 1:
        raise _Bad(f"exactly one of the keys {', '.join(FORMATS)} was expected, found {', '.join(found) or 'only ' + str(sorted(record)[:8])}")
    if "\\ud" in text.lower():  # JSON can spell half a UTF-16 pair, which no tokenizer can read
        try:
            json.dumps({k: record.get(k) for k in (*FORMATS, "tools")}, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise _Bad(f"a lone surrogate {e.object[e.start]!a} in the text") from e
    return record


def _encode(record: dict[str, Any], at: _Reading) -> Iterator[Encoded]:
    """The record's samples before truncation."""
    if "messages" in record:
        messages, tools = _check_messages(record["messages"]), record.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
            raise _Bad("tools is not a list of objects")
        if not getattr(at.tokenizer, "chat_template", None) or not at.tokenizer.is_fast:
            raise ValueError(f"{type(at.tokenizer).__name__} needs a chat template and character offsets (a fast tokenizer) to read conversations: "
                             "take the model's Instruct tokenizer, set tokenizer.chat_template, or give text")
        yield from _conversation(messages, tools, at)
    elif "text" in record:
        if not isinstance(record["text"], str) or not record["text"]:
            raise _Bad("text is empty" if record["text"] == "" else f"text is a {type(record['text']).__name__}, not a string")
        ids, eos = at.tokenizer(record["text"], verbose=False)["input_ids"], at.tokenizer.eos_token_id
        ids = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        yield np.array(ids, np.int64), np.ones(len(ids), bool)
    else:
        ids, labels = _int_list(record, "input_ids"), _int_list(record, "labels") if "labels" in record else None
        labels = ids if labels is None else labels
        if len(labels) != len(ids):
            raise _Bad(f"{len(ids)} input_ids but {len(labels)} labels")
        wrong = np.flatnonzero((labels != ids) & (labels != -100))
        if len(wrong):
            i = wrong[0]
            raise _Bad(f"labels[{i}] is {labels[i]}, neither -100 nor input_ids[{i}]={ids[i]}: labels are not to be shifted")
        yield ids, np.ones(len(ids), bool) if at.everything else labels != -100


def _int_list(record: dict[str, Any], key: str) -> np.ndarray:
    values = record[key]
    if not isinstance(values, list) or not values or not all(type(v) is int and abs(v) < 2**31 for v in values):
        raise _Bad(f"{key} is not a list of integers, or empty")
    return np.array(values, np.int64)


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _Bad("messages is empty" if messages == [] else f"messages is a {type(messages).__name__}, not a list")
    for i, m in enumerate(messages):
        if not isinstance(m, dict):
            raise _Bad(f"messages[{i}] is a {type(m).__name__}, not an object")
        if m.get("role") not in ROLES:
            raise _Bad(f"messages[{i}] has the unknown role {m.get('role')!r}: known are {', '.join(ROLES)}")
        if not isinstance(m.get("content"), str) and not (m.get("content") is None and m["role"] == "assistant" and m.get("tool_calls")):
            raise _Bad(f"messages[{i}].content is {'missing' if 'content' not in m else 'a ' + type(m['content']).__name__}, not a string")
        if unread := {"loss", "weight"} & set(m):
            raise _Bad(f"messages[{i}] has {unread.pop()!r}, which is not read yet: remove it, or mask by hand with input_ids and labels")
    return messages


def _conversation(messages: list[dict[str, Any]], tools: Any, at: _Reading) -> Iterator[Encoded]:
    if at.everything:
        yield _masked(_apply(at, messages, tools), None, at)
        return
    if re.search(r"\{%-?\s*generation\s*-?%\}", at.tokenizer.get_chat_template(tools=tools)):
        out = _apply(at, messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        yield np.array(out["input_ids"], np.int64), np.array(out["assistant_masks"], bool)
        return
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        yield _masked(_apply(at, messages, tools), [], at)
        return
    # What follows the last turn is context of nothing that carries loss, so it is not rendered.
    prompts = [_apply(at, messages[:i], tools, add_generation_prompt=True) for i in turns]
    texts = [_apply(at, messages[:i + 1], tools) for i in turns]
    for i, prompt, text in zip(turns, prompts, texts, strict=True):
        if not text.startswith(prompt):
            raise _Bad(f"the chat template's generation prompt after messages[:{i}] is not how it begins messages[{i}], so what was generated "
                       "is unknown: give the template {% generation %} marks, or train on everything")
    spans = [(len(prompt), len(text)) for prompt, text in zip(prompts, texts, strict=True)]
    if all(texts[-1].startswith(text) for text in texts):
        yield _masked(texts[-1], spans, at)
    else:
        for text, span in zip(texts, spans, strict=True):
            yield _masked(text, [span], at)


def _apply(at: _Reading, messages: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
    """The chat template's rendering. Templates raise what they like on input they refuse, so all of it is the line's fault."""
    try:
        return at.tokenizer.apply_chat_template(messages, tools=tools, **{"tokenize": False, **options})
    except Exception as e:
        raise _Bad(f"the chat template refuses the first {len(messages)} messages: {type(e).__name__}: {e}") from e


def _masked(text: str, spans: list[Span] | None, at: _Reading) -> Encoded:
    """One tokenisation of the whole text; the loss is on tokens that begin inside a span, up to the token that ends the turn (None: on all)."""
    out = at.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, mask = np.array(out["input_ids"], np.int64), np.full(len(out["input_ids"]), spans is None)
    if not spans or not len(ids):
        return ids, mask
    starts, ends = np.array(out["offset_mapping"], np.int64).T
    starts[1:] = np.minimum(starts[1:], ends[:-1])  # some tokenizers leave a token's leading spaces out of its offsets
    special = np.isin(ids, at.special)
    for start, end in spans:
        first, last = np.searchsorted(starts, (start, end))
        at.stats.straddling += int(first > 0 and ends[first - 1] > start)
        marks = np.flatnonzero(special[first:last])
        if len(marks) and not text[ends[first + marks[-1]]:end].strip():
            last = first + marks[-1] + 1  # what remains is the template's own white space after the end of the turn
        mask[first:last] = True
    return ids, mask
