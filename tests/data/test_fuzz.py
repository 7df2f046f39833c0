"""10,000 lines of every kind of nonsense among good ones: no good line is lost, none crashes, every bad one is
named."""
import json
import random
from collections.abc import Callable

import pytest

from tests.data.templates import FAMILIES, tokenizer_for
from xtf.data import read_samples
from xtf.data.chat import Encoder
from xtf.data.formats import Bad

ODD = ["", " ", "\0", "\u2028", "\u202e", "\ufeff", "\ufffe", "e\u0301" * 3, "👩‍👩‍👧‍👦", "𐍈",
       "\ud800", "\udc00x", "\x7f\x1b[31m", "{{ 7 * 7 }}", "{% raw %}", "<|im_end|>", "<|im_start|>assistant",
       "</think>", "<think>", "<tool_call>",
       "\ue0f0<|im_end|>\ue0f1", "İı", "ﷺ", "\r\n", "a" * 3000]
KEYS = ["messages", "conversations", "instruction", "input", "output", "question", "answer", "text", "input_ids",
        "labels", "tools", "role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "loss",
        "weight", "thinking", "chat_template_kwargs",
        "type", "image", "history", "system"]
ROLES = ["user", "assistant", "system", "tool", "developer", "robot", "", None, 3, ["user"], "human", "gpt"]


def value(draw: random.Random, depth: int = 0):
    """Some JSON; the more deeply, the simpler."""
    kinds: list[Callable] = [lambda: draw.choice([None, True, False, 0, 1, -1, 2**31, 10**30, 0.5, float("nan"),
                                                  float("inf"), -100]),
                             lambda: draw.choice(ODD), lambda: draw.choice(ROLES)]
    if depth < 4:
        kinds += [lambda: [value(draw, depth + 1) for _ in range(draw.randrange(4))],
                  lambda: {draw.choice(KEYS): value(draw, depth + 1) for _ in range(draw.randrange(4))}]
    return draw.choice(kinds)()


def talk(draw: random.Random) -> list:
    """Messages that are nearly good."""
    roles = draw.choices(["user", "assistant", "system", "tool"], k=draw.randrange(1, 5))
    out = [{"role": role, "content": "".join(draw.choices(ODD, k=2))} for role in roles]
    for _ in range(draw.randrange(2)):
        draw.choice(out)[draw.choice(KEYS)] = value(draw)
    return out


def mutated(draw: random.Random, line: bytes) -> bytes:
    changed = bytearray(line)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(changed))
        if draw.random() < 0.5:
            changed[at] = draw.randrange(256)
        elif draw.random() < 0.5:
            del changed[at:at + draw.randrange(1, 9)]
            changed = changed or bytearray(b"{")
        else:
            changed[at:at] = draw.randbytes(3)
    return bytes(changed)


def junk(draw: random.Random) -> bytes:
    dump = lambda x: json.dumps(x, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    n = draw.choice([50, 900, 5000])
    line = draw.choice([
        lambda: draw.randbytes(draw.randrange(60)),
        lambda: mutated(draw, dump({"messages": [{"role": "user", "content": "Why?"},
                                                 {"role": "assistant", "content": "So."}]})),
        lambda: mutated(draw, dump({"instruction": "Why?", "input": "", "output": "So."})),
        lambda: dump({draw.choice(KEYS): value(draw) for _ in range(draw.randrange(4))}),
        lambda: dump({draw.choice(["messages", "conversations"]): draw.choice([talk(draw), value(draw)])}),
        lambda: dump({"messages": talk(draw), "tools": value(draw),
                      "chat_template_kwargs": {draw.choice(["enable_thinking", "x"]): value(draw)}}),
        lambda: dump({"text": "".join(draw.choices(ODD, k=3))}),
        lambda: dump({"input_ids":
                      [draw.choice([5, -1, 10**9, 2**40, True, None, "5"]) for _ in range(draw.randrange(4))]}),
        lambda: b"[" * n + b"]" * n,
        lambda: b'{"text": ' + b"[" * n + b"]" * n + b"}",
        lambda: b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": ' + b'{"function":' * n + b"1"
        + b"}" * n + b"}]}", lambda: draw.choice([b"", b"\r", b" \t", b"null", b"\xef\xbb\xbf", b"\xff\xfe{\0}\0",
                                                  b'{"text": "a"', b"{'text': 'a'}", b"\0" * 40]),
    ])()
    return line.replace(b"\n", b" ")


def good(draw: random.Random, name: str) -> bytes:
    """A line that must not be lost; `name` is in its text."""
    extra = draw.choice([{}, {"score": float("nan")}, {"_trace_id": "1f"}, {"meta": {"a": [None]}},
                         {"odd": draw.choice(ODD[:10])}])
    said = name + " " + draw.choice([o for o in ODD if not any("\ud800" <= c <= "\udfff" for c in o)])
    ask = {"role": "user", "content": "?"}
    record = draw.choice([
        {"text": said}, {"messages": [ask, {"role": "assistant", "content": said}]}, {"question": "?", "answer": said},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": said}]},
        {"instruction": "?", "output": said},
        {"messages": [ask | {"content": [{"text": "?", "image": None}]},
                      {"role": "assistant", "content": [{"type": "text", "text": said}]}]}])
    line = json.dumps(extra | record, ensure_ascii=draw.random() < 0.5).encode()
    return draw.choice([b"", b"", b"\xef\xbb\xbf", b" "]) + line + draw.choice([b"", b"", b"\r", b"  "])


def check(make_tokenizer, folder, family: str, cases: int, seed: int):
    draw, tokenizer = random.Random(seed), tokenizer_for(FAMILIES[family], make_tokenizer)
    names = [f"good-{i}." for i in range(cases // 10)]
    lines, at = [], iter(names)
    for i in range(cases):
        lines += [junk(draw)] + ([good(draw, next(at))] if i % 10 == 9 else [])
    path = folder / f"{family}.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    samples, stats = read_samples(path, tokenizer, 100_000, on_bad="skip", vocab_size=len(tokenizer))
    assert stats.lines == len(lines) and stats.bad > cases // 4
    found = [text for s in samples if "good-" in (text := tokenizer.decode(s.ids, skip_special_tokens=False))]
    assert len(found) == len(names) and all(n in f for n, f in zip(names, found, strict=True))
    assert all(s.mask.any() and not s.mask[0] and 2 <= len(s.ids) == len(s.mask) for s in samples)
    assert len(stats.bad_lines) == 5 and all(b.reason and str(path) in str(b) for b in stats.bad_lines)
    return lines, tokenizer


@pytest.mark.parametrize("family, cases", [("qwen3", 8000), ("gpt-oss", 1000), ("deepseek-r1", 1000)])
def test_no_good_line_is_lost_and_none_crashes(make_tokenizer, tmp_path, family, cases):
    lines, tokenizer = check(make_tokenizer, tmp_path, family, cases, seed=cases)
    lines = lines[:1000]
    encoder = Encoder(tokenizer, vocab_size=len(tokenizer))
    together = encoder.many(lines)
    for line, some in zip(lines, together, strict=True):     # many at once are as one by one
        try:
            alone = encoder(line)
        except Bad as e:
            assert isinstance(some, Bad) and str(some) == str(e)
        else:
            assert [(a.ids.tolist(), a.mask.tolist(), a.splittable)
                    for a in alone] == [(b.ids.tolist(), b.mask.tolist(), b.splittable) for b in some]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_more_of_the_same(make_tokenizer, tmp_path, family):
    check(make_tokenizer, tmp_path, family, 10_000, seed=7)


def test_one_huge_line(make_tokenizer, write):
    tokenizer = tokenizer_for(FAMILIES["qwen3"], make_tokenizer)
    text = "Return the sum of two numbers. " * 50_000       # 1.5 MB
    file = write({"text": text}, {"messages": [{"role": "user", "content": text},
                                               {"role": "assistant", "content": "Yes."}]}, {"text": "good"})
    samples, stats = read_samples(file, tokenizer, 1 << 30)
    assert [len(s.ids) > 100_000 for s in samples] == [True, True, False] and stats.bad == 0
    assert tokenizer.decode(samples[0].ids, skip_special_tokens=True) == text
    assert tokenizer.decode(samples[1].ids[samples[1].mask]).startswith("Yes.")
