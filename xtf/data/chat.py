"""Records in, tokens with a loss mask out: the loss falls on what inference would have generated.

Formats are in formats.py, templates in template.py. n: tokens of one sample. Positions in rendered text are character
offsets.
"""
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np
import torch

from xtf.data.batch import Sample
from xtf.data.formats import Bad, Chat, Text, Tokens, parse, read
from xtf.data.read import records, split_file
from xtf.data.template import Template, Turn

RULES = "1"  # to be raised whenever the same record comes to give other tokens, so that caches are made anew
NOTES = {                      # what is counted in Stats.notes, and how it is said
    "literals": "control tokens written out in messages, read as text",
    "reasoning": "turns whose reasoning the template leaves out",
    "messages": "messages that the template leaves out or rewrites",
    "tools": "conversations whose tools the template leaves out",
    "unmarked": "assistant turns in which the template marks nothing as generated",
}


class BadLine(ValueError):
    """A line of a data file that cannot be trained on: `file`, `line` (from 1; of Parquet the row) and `reason`."""

    def __init__(self, file: str, line: int, reason: str):
        super().__init__(f'{file}:{line}: {reason} (mend the line, or skip such lines: --on-bad-line skip, '
                         'on_bad="skip")')
        self.file, self.line, self.reason = file, line, reason


@dataclass
class Stats:
    """What became of the lines: nothing is left out without being counted here.

    >>> stats = Stats(lines=2, samples=2, tokens=90, loss_tokens=40, truncated=1, tokens_dropped=8)
    >>> stats.notes["literals"] += 3
    >>> for part in str(stats).split("; "):
    ...     print(part)
    2 samples of 2 lines, 90 tokens, 40 with loss
    1 truncated (8 tokens dropped)
    3 control tokens written out in messages, read as text
    """
    lines: int = 0
    bad: int = 0              # lines skipped; the first few reasons are in bad_lines
    samples: int = 0
    tokens: int = 0           # in the samples kept
    loss_tokens: int = 0      # of those, the predicted ones
    truncated: int = 0        # samples cut to seq_len ...
    tokens_dropped: int = 0   # ... and the tokens cut off
    without_loss: int = 0     # samples dropped because no token in them carries loss
    notes: Counter[str] = field(default_factory=Counter)    # Encoder.counts: keys of NOTES
    bad_lines: list[BadLine] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.samples:,} samples of {self.lines:,} lines"
        text += f", {self.tokens:,} tokens, {self.loss_tokens:,} with loss"
        text += f"; {self.truncated:,} truncated ({self.tokens_dropped:,} tokens dropped)" if self.truncated else ""
        text += f"; {self.without_loss:,} dropped without a token that carries loss" if self.without_loss else ""
        text += "".join(f"; {self.notes[key]:,} {said}" for key, said in NOTES.items() if self.notes[key])
        text += f"; {self.bad:,} bad lines skipped: " + "; ".join(map(str, self.bad_lines)) if self.bad else ""
        return text


class Encoded(NamedTuple):
    """One sample, whole: `ids` int32 [n], `mask` bool [n] (False first), `splittable`.

    What is splittable, a text, is split where it is long; others are truncated.
    """
    ids: np.ndarray
    mask: np.ndarray
    splittable: bool


class _Pieces(NamedTuple):
    """Tokens of a rendered text: ids, where each starts and ends in it (int64 [n]), whether it is a control token."""
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    special: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """Records to samples; picklable, so that other processes can do the work.

    In a conversation the assistant's turns carry loss, up to and including the token that ends the turn: by the
    template's `{% generation %}` marks if it has them, else by rendering what precedes each turn. A sample holds as
    many turns as stand in it exactly as when they were generated. Where a template renders a turn differently once
    others follow (Qwen3 drops earlier reasoning), or tokens run together across the border of prompt and answer, turns
    become samples of their own. Control tokens that somebody wrote out in a message are read as text.

    Args:
        tokenizer: a fast transformers tokenizer (or what `xtf.data.tokenizer.load` gives), with a chat template if
            there are conversations; None will do for input_ids.
        train_on_everything: every token carries loss, whatever the format.
        vocab_size: the model's, if known: ids beyond it make a record bad.

    `counts` says what a user should hear about, by keys of NOTES; workers' are to be added up.

    >>> Encoder(None)({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})[0].mask.tolist()
    [False, True, True]
    """
    tokenizer: Any
    train_on_everything: bool = False
    vocab_size: int | None = None
    counts: Counter[str] = field(default_factory=Counter, compare=False)

    def __call__(self, record: bytes | dict[str, Any]) -> list[Encoded]:
        """The samples of a raw line or a row.

        Raises Bad, saying why; ValueError if a conversation meets a tokenizer without template or offsets.
        """
        what = read(parse(record) if isinstance(record, bytes) else record)
        if isinstance(what, Text):
            return [self._document(self.tokenizer(what.text, verbose=False)["input_ids"])]
        if isinstance(what, Tokens):
            whole = what.labels is None or self.train_on_everything
            mask = np.ones(len(what.ids), bool) if whole else what.labels != -100
            return [self._checked(what.ids, mask, what.labels is None)]
        return [self._checked(ids, mask, False) for ids, mask in self._conversation(what)]

    def many(self, batch: Sequence[bytes | dict[str, Any]]) -> list[list[Encoded] | Bad]:
        """Each record's samples, or why there are none; texts are tokenised together, which is faster."""
        out: list[Any] = [None] * len(batch)
        texts: dict[int, str] = {}
        for i, record in enumerate(batch):
            try:
                record = parse(record) if isinstance(record, bytes) else record
                if "text" in record and isinstance(what := read(record), Text):
                    texts[i] = what.text
                else:
                    out[i] = self(record)
            except Bad as e:
                out[i] = e
        ids = self.tokenizer(list(texts.values()), verbose=False)["input_ids"] if texts else []
        for i, found in zip(texts, ids, strict=True):
            try:
                out[i] = [self._document(found)]
            except Bad as e:
                out[i] = e
        return out

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the samples depend on besides the data, under the names that a user would call it."""
        sha = lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        tokenizer = self.tokenizer
        if getattr(tokenizer, "is_fast", False):
            # those two change as it is used
            core = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
            words = json.dumps([core, self._names, tokenizer.eos_token_id], sort_keys=True, default=str)
        else:
            words = f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items()) if tokenizer else ''}"
        return {"tokenizer": sha(words),
                "template": sha(json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)),
                "options": f"rules={RULES} train_on_everything={self.train_on_everything} vocab_size={self.vocab_size}"}

    # ---- all formats -------------------------------------------------------------------------------------------------

    def _checked(self, ids: np.ndarray, mask: np.ndarray, splittable: bool) -> Encoded:
        if not len(ids):
            raise Bad("no tokens at all")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            raise Bad(f"token id {low if low < 0 else high} is outside the vocabulary"
                      + (f" of {self.vocab_size}" if self.vocab_size else ""))
        mask[0] = False                                      # nothing predicts the first token
        return Encoded(ids.astype(np.int32, copy=False), mask, splittable)

    def _document(self, ids: list[int]) -> Encoded:
        eos = self.tokenizer.eos_token_id
        found = np.array(ids if eos is None or ids[-1:] == [eos] else [*ids, eos], np.int32)
        return self._checked(found, np.ones(len(found), bool), True)

    # ---- conversations -----------------------------------------------------------------------------------------------

    @cached_property
    def _names(self) -> dict[str, Any]:
        return dict(getattr(self.tokenizer, "special_tokens_map", {}))

    @cached_property
    def _templates(self) -> dict[str, Template]:
        return {}

    @cached_property
    def _prompts(self) -> dict[str, list[int]]:
        return {}                                            # ids of the ends of prompts, which repeat

    @cached_property
    def _special(self) -> np.ndarray:
        return np.array([i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special], np.int64)

    @cached_property
    def _newline(self) -> list[int]:
        return self.tokenizer("\n", add_special_tokens=False)["input_ids"]

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Control tokens, longest first; not tags of reasoning, which templates look for in what the assistant says."""
        names = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special} - {"<think>", "</think>"}
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    def _template(self, chat: Chat) -> Template:
        known = self.tokenizer
        if not getattr(known, "chat_template", None) or not getattr(known, "gives_offsets", known.is_fast):
            raise ValueError(f"{type(self.tokenizer).__name__} needs a chat template and character offsets (a fast "
                             "tokenizer) to read conversations: take the model's Instruct tokenizer, set "
                             "tokenizer.chat_template, or give text")
        source = self.tokenizer.get_chat_template(tools=chat.tools)
        if source not in self._templates:
            self._templates[source] = Template(source, self._names)
        return self._templates[source]

    def _conversation(self, chat: Chat) -> list[tuple[np.ndarray, np.ndarray]]:
        template = self._template(chat)
        chat = template.prepare(chat)
        unmarked = chat.messages
        chat, literals, between = self._literals(chat)
        if literals:
            template.render(unmarked, chat)                  # some refuse control tokens; the marks would hide them
        turns = [] if self.train_on_everything else [template.turn(chat, i) for i, on in enumerate(chat.loss) if on]
        whole = turns[-1].text if turns else template.render(chat.messages, chat)[0]
        out: list[tuple[np.ndarray, np.ndarray]] = []
        if not turns:
            ids = self._encode(whole, between).ids
            out.append((ids, np.full(len(ids), self.train_on_everything)))
        left = turns
        while left:  # each round: all turns that stand in the last one's text as they were generated
            here = [t for t in left if left[-1].text.startswith(t.text)]
            left = [t for t in left if t not in here]
            out = self._samples(here, between) + out
        self.counts["literals"] += literals
        self.counts["reasoning"] += sum(t.unseen for t in turns)
        self.counts["unmarked"] += sum(not t.spans for t in turns)
        shown = "".join(t.text for t in turns[:-1]) + whole if len(turns) > 1 else whole
        given = chat.messages[:1 + max(i for i, on in enumerate(chat.loss) if on)] if turns else chat.messages
        self.counts["messages"] += sum(m["role"] in ("system", "developer", "user")
                                       and m["content"].strip() not in shown for m in given)
        self.counts["tools"] += bool(chat.tools) and not all(_tool_name(t) in whole for t in chat.tools)
        return out

    def _literals(self, chat: Chat) -> tuple[Chat, int, re.Pattern[str] | None]:
        """The conversation with control tokens in its strings between marks, how many, the pattern that finds them."""
        found, start, end = 0, "", ""

        def mark(value: Any) -> Any:
            nonlocal found
            if isinstance(value, str):
                value, n = self._control.subn(f"{start}\\g<0>{end}", value)
                found += n
                return value
            if isinstance(value, dict):
                return {k: v if k == "role" else mark(v) for k, v in value.items()}
            return [mark(v) for v in value] if isinstance(value, list) else value

        mark([chat.messages, chat.tools, chat.options])
        if not found:
            return chat, 0, None
        used = json.dumps([chat.messages, chat.tools, chat.options], ensure_ascii=False)
        free, number = (c for c in map(chr, range(0xE000, 0xF900)) if c not in used), found
        start, end = next(free), next(free)
        marked = Chat([mark(m) for m in chat.messages], chat.loss, mark(chat.tools), mark(chat.options))
        return marked, number, re.compile(f"{start}([^{start}{end}]*){end}")

    def _samples(self, turns: list[Turn], between: re.Pattern[str] | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """One sample of turns in one text, and one of each turn tokenised differently there than when generated."""
        text = turns[-1].text
        whole = self._encode(text, between)
        mask, out = np.zeros(len(whole.ids), bool), []
        for turn in turns:
            if self._exact(whole, turn, between):
                self._mark(mask, whole, turn)
            else:
                alone = _joined([self._encode(turn.text[:turn.start], between),
                                 self._encode(turn.text[turn.start:], between, turn.start)])
                out.append((alone.ids, np.zeros(len(alone.ids), bool)))
                self._mark(out[-1][1], alone, turn)
        out += [(whole.ids, mask)] if mask.any() or not out else []
        ends = [1 + max(np.flatnonzero(mask), default=len(ids) - 1) for ids, mask in out]
        # nothing after the last that is trained
        return [(ids[:end], mask[:end]) for (ids, mask), end in zip(out, ends, strict=True)]

    def _exact(self, whole: _Pieces, turn: Turn, between: re.Pattern[str] | None) -> bool:
        """Whether the prompt is tokenised here as it is by itself, and the turn ends where a token ends."""
        first, last = np.searchsorted(whole.starts, (turn.start, len(turn.text)))
        if (first and whole.ends[first - 1] > turn.start) or (last and whole.ends[last - 1] > len(turn.text)):
            return False
        cuts = np.flatnonzero(whole.special[:first])  # nothing before a control token has a say in the tokens after it
        at = cuts[-1] if len(cuts) else 0
        end = turn.text[whole.starts[at] if at else 0:turn.start]
        if end not in self._prompts:
            ids = self._encode(end, between).ids.tolist()
            if between or len(end) > 100:
                return ids == whole.ids[at:first].tolist()
            self._prompts[end] = ids
        return self._prompts[end] == whole.ids[at:first].tolist()

    @staticmethod
    def _mark(mask: np.ndarray, tokens: _Pieces, turn: Turn) -> None:
        """Put loss on tokens that begin inside the turn's spans, up to the token that ends the turn."""
        for start, end in turn.spans:
            first, last = np.searchsorted(tokens.starts, (start, end))
            ends = np.flatnonzero(tokens.special[first:last])
            if len(ends) and not turn.text[tokens.ends[first + ends[-1]]:end].strip():
                last = first + ends[-1] + 1  # what remains is the template's own white space after the end of the turn
            mask[first:last] = True

    def _encode(self, text: str, between: re.Pattern[str] | None, at: int = 0) -> _Pieces:
        """Tokens of rendered text at offset `at` of its sample: plain between marks, else with control tokens."""
        pieces = between.split(text) if between else [text]
        marks = (between.pattern[0], between.pattern[-1]) if between else ()
        left = any(mark in piece for piece in pieces for mark in marks)
        if left or any(f"\\u{ord(mark):04x}" in text for mark in marks):
            raise Bad("the chat template takes control tokens in messages apart, so they cannot be told from its own")
        out, position = [], at
        for k, piece in enumerate(pieces):
            position += k % 2                                # the mark before, and one after
            if piece:
                out.append(self._piece(piece, position, literal=k % 2 == 1))
            position += len(piece) + k % 2
        return _joined(out)

    def _piece(self, text: str, position: int, literal: bool) -> _Pieces:
        """Tokens of one piece, tokenised after a line feed if not the first: SentencePiece adds a space to a text."""
        options: dict[str, Any] = {"split_special_tokens": True} if literal else {}
        options |= {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False,
                    "verbose": False}
        tokenize = lambda text: self.tokenizer(text, **options)
        before = len(self._newline) if position else 0
        out = tokenize("\n" + text if before else text)
        if before and out["input_ids"][:before] != self._newline:
            before, out = 0, tokenize(text)
        shift = position - bool(before)
        ids = np.array(out["input_ids"], np.int32)[before:]
        starts, ends = np.array(out["offset_mapping"], np.int64).reshape(-1, 2)[before:].T + shift
        # some tokenizers leave a token's leading spaces out of its offsets
        starts[1:] = np.minimum(starts[1:], ends[:-1])
        special = np.zeros(len(ids), bool) if literal else np.isin(ids, self._special)
        if literal and np.isin(ids, self._special).any():
            raise Bad(f"the control token {text!r} is written out in a message, and the tokenizer knows no way to "
                      "read it as text")
        return _Pieces(ids, starts, ends, special)


def _tool_name(tool: dict[str, Any]) -> str:
    """The name of a tool, or "" where it stands in no known place."""
    inner = tool.get("function")
    name = (inner if isinstance(inner, dict) else tool).get("name")
    return name if isinstance(name, str) else ""


def _joined(pieces: list[_Pieces]) -> _Pieces:
    if len(pieces) == 1:
        return pieces[0]
    if not pieces:
        empty = np.zeros(0, np.int64)
        return _Pieces(empty, empty, empty, empty.astype(bool))
    return _Pieces(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))


def read_samples(files: str | PathLike | Sequence[str | PathLike], tokenizer: Any, seq_len: int, *,
                 train_on_everything: bool = False, on_bad: str = "raise",
                 vocab_size: int | None = None) -> tuple[list[Sample], Stats]:
    """The samples of JSONL or Parquet files, all in memory, and what was dropped on the way; see Encoder.

    Samples hold ids int64 [n] and mask bool [n], 2 <= n <= seq_len. Longer ones keep their first seq_len tokens.

    Args:
        tokenizer, train_on_everything, vocab_size: as for Encoder.
        on_bad: "raise" stops at the first bad line; "skip" counts and reports it in the stats.

    Raises BadLine, naming file, line and reason; ValueError if a conversation meets a tokenizer without template or
    offsets.

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
    encoder, stats, samples = Encoder(tokenizer, train_on_everything, vocab_size), Stats(), []
    for file in [files] if isinstance(files, str | PathLike) else files:
        rows = (row for chunk in split_file(fspath(file)) for _, row in records(chunk))
        for number, row in enumerate(rows, 1):
            stats.lines += 1
            try:
                encoded = encoder(row)
            except Bad as e:
                bad = BadLine(fspath(file), number, str(e))
                if on_bad == "raise":
                    raise bad from e
                stats.bad += 1
                stats.bad_lines += [bad] if len(stats.bad_lines) < 5 else []
                continue
            samples += [s for x in encoded if (s := _sample(x, stats.lines - 1, seq_len, stats))]
    stats.notes = +encoder.counts
    return samples, stats


def _sample(encoded: Encoded, source: int, seq_len: int, stats: Stats) -> Sample | None:
    stats.truncated += len(encoded.ids) > seq_len
    stats.tokens_dropped += max(0, len(encoded.ids) - seq_len)
    ids, mask = encoded.ids[:seq_len].astype(np.int64), encoded.mask[:seq_len].copy()
    if not mask.any():
        stats.without_loss += 1
        return None
    stats.samples += 1
    stats.tokens += len(ids)
    stats.loss_tokens += int(mask.sum())
    return Sample(torch.from_numpy(ids), torch.from_numpy(mask), source)
