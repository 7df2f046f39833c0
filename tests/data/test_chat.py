"""Which tokens carry loss: exactly those that inference would have generated; and every line that cannot be used is
named.

The chat templates are written anew in the manner of published ones."""
import json
import pickle
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtf.data import BadLine, Encoder, read_samples

# ChatML, every role alike.
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# The same, saying itself what was generated.
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\
{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Qwen3's manner: reasoning is shown in the turns after the last question only.
THINKING = """{% set ns = namespace(last=0) %}\
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Llama 3's manner: no white space after the token that ends a turn, contents trimmed.
HEADERS = """{{ bos_token }}{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>
{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>
{% endif %}"""

# The prompt ends in a space.
SPACED = ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}"
          "{% if add_generation_prompt %}assistant: {% endif %}")

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "It is 4."}, {"role": "user", "content": "And 3+3?"},
        {"role": "assistant", "content": "6,\n  of course: ½·12 — 六!"}]


def runs(sample):
    """The stretches of tokens that carry loss, as lists of ids."""
    out, before = [], False
    for token, on in zip(sample.ids.tolist(), sample.mask.tolist(), strict=True):
        if on:
            out = [*out[:-1], [*out[-1], token]] if before else [*out, [token]]
        before = on
    return out


def trained_texts(samples, tokenizer):
    return [[tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs(s)]
            for s in samples]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template, end", [(MARKED, "<|im_end|>"), (CHATML, "<|im_end|>"), (HEADERS, "<|eot|>")])
def test_the_assistants_words_and_end_token_are_trained(make_tokenizer, write, template, end, trim_offsets):
    tokenizer = make_tokenizer(template, trim_offsets)
    samples, stats = read_samples(write({"messages": TALK}), tokenizer, 512)
    assert trained_texts(samples, tokenizer) == [[TALK[2]["content"] + end, TALK[4]["content"] + end]]
    whole = tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)["input_ids"]
    n = len(samples[0].ids)
    # it ends where the turn does
    assert samples[0].ids.tolist() == whole[:n] and not tokenizer.decode(whole[n:]).strip() and samples[0].mask[-1]
    assert (stats.samples, stats.tokens, stats.loss_tokens) == (1, n, int(samples[0].mask.sum())) and not stats.notes
    assert samples[0].ids.dtype == torch.int64 and samples[0].mask.dtype == torch.bool


def test_dropped_reasoning_makes_one_sample_of_each_turn(make_tokenizer, write):
    tokenizer = make_tokenizer(THINKING)
    talk = [*TALK[:2], TALK[2] | {"reasoning_content": "Two and two."}, TALK[3],
            TALK[4] | {"reasoning_content": "Three."}, {"role": "user", "content": "Ta."}]
    samples, stats = read_samples(write({"messages": talk}), tokenizer, 512)
    assert trained_texts(samples, tokenizer) == [["<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>"],
                                                 ["<think>\nThree.\n</think>\n\n" + TALK[4]["content"] + "<|im_end|>"]]
    assert "Two and two" not in tokenizer.decode(samples[1].ids)  # the second turn was generated without it in sight
    assert {s.source for s in samples} == {0} and stats.samples == 2
    plain, _ = read_samples(write({"messages": TALK}), tokenizer, 512)
    assert len(plain) == 1 and len(runs(plain[0])) == 2  # nothing to drop: the prefixes are exact


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template, answer, end",
                         [(CHATML, "\n\nIs it?", "<|im_end|>"), (SPACED, "the sum", "<|eot|>")])
def test_tokens_do_not_cross_the_border_of_prompt_and_answer(make_tokenizer, write, template, answer, end,
                                                             trim_offsets):
    """Where they would in the whole text, the turn is a sample of its own, cut there as inference cuts it."""
    tokenizer = make_tokenizer(template, trim_offsets)
    talk = [*TALK[:2], {"role": "assistant", "content": answer}, *TALK[3:]]
    samples, _ = read_samples(write({"messages": talk}), tokenizer, 512)
    assert sorted(trained_texts(samples, tokenizer)) == sorted([[answer + end], [TALK[4]["content"] + end]])
    prompt = tokenizer.apply_chat_template(talk[:2], add_generation_prompt=True, return_dict=False)
    assert sum(s.ids[:len(prompt)].tolist() == prompt and bool(s.mask[len(prompt)]) for s in samples) == 1
    joined = tokenizer(tokenizer.apply_chat_template(talk[:3], tokenize=False), add_special_tokens=False)["input_ids"]
    assert joined[:len(prompt)] != prompt                    # so there was something to cut


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30).filter(lambda s: "<|" not in s)
CONTENT = st.tuples(st.sampled_from(["", "", "\n", "\n\n", " ", "the "]), TEXT).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), st.booleans())
def test_prompts_are_what_inference_would_see(make_tokenizer, write, turns, trim_offsets):
    """Whatever is said, whether or not offsets leave spaces out: before each trained run stand the prompt's own tokens,
    then all that was said."""
    tokenizer = make_tokenizer(CHATML, trim_offsets)
    talk = [m for user, answer in turns
            for m in ({"role": "user", "content": user}, {"role": "assistant", "content": answer})]
    samples, _ = read_samples(write({"messages": talk}), tokenizer, 10_000)
    wanted = {(*tokenizer.apply_chat_template(talk[:i], add_generation_prompt=True, return_dict=False),
               *tokenizer(talk[i]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"])
              for i in range(1, len(talk), 2)}
    ends = [(s, i + 1) for s in samples for i in range(len(s.ids)) if s.mask[i]
            and not (i + 1 < len(s.ids) and s.mask[i + 1])]
    assert {tuple(s.ids[:end].tolist()) for s, end in ends} == wanted and len(ends) == len(turns)


def test_train_on_everything(make_tokenizer, write):
    for template in (CHATML, MARKED, THINKING):
        samples, stats = read_samples(write({"messages": TALK}), make_tokenizer(template), 512,
                                      train_on_everything=True)
        assert len(samples) == 1 and samples[0].mask.tolist() == [False] + [True] * (stats.tokens - 1)


def test_text_and_tokens(make_tokenizer, write):
    tokenizer = make_tokenizer(CHATML)
    file = write({"text": "Return the sum."}, {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "id": "x"},
                 {"input_ids": [5, 6]})
    (text, tokens, bare), stats = read_samples(file, tokenizer, 64)
    assert tokenizer.decode(text.ids) == "Return the sum.<|end_of_text|>"
    assert text.mask.tolist() == [False] + [True] * (len(text.ids) - 1)
    assert tokens.ids.tolist() == [5, 6, 7, 8] and tokens.mask.tolist() == [False, False, True, True]
    assert bare.mask.tolist() == [False, True]
    assert (stats.lines, stats.samples, stats.loss_tokens) == (3, 3, len(text.ids) - 1 + 2 + 1)
    assert len(read_samples(write({"input_ids": [1, 2]}, name="a"), None, 8)[0]) == 1  # no tokenizer needed


def test_truncation_and_samples_without_loss_are_counted(write):
    file = write({"input_ids": list(range(10)), "labels": [-100] * 4 + list(range(4, 10))},
                 {"input_ids": [1, 2], "labels": [1, -100]}, {"input_ids": [3]},
                 {"input_ids": list(range(9)), "labels": [-100] * 8 + [8]})
    samples, stats = read_samples([file, file], None, 6)
    assert [s.ids.tolist() for s in samples] == [list(range(6))] * 2 and [s.source for s in samples] == [0, 4]
    assert (stats.lines, stats.samples, stats.truncated, stats.tokens_dropped, stats.without_loss) == (8, 2, 4, 14, 6)
    assert stats.loss_tokens == 4 and all(word in str(stats)
                                          for word in ("4 truncated", "14 tokens dropped", "6 dropped"))


BAD = [
    (b'{"text": "a', "broken JSON"),
    (b'{"input_ids": [' + b"9" * 5000 + b"]}", "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b"[1]", "a JSON list"),
    (b"", "empty line"),
    (b"  \r", "empty line"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b"{}", "exactly one"),
    (b'{"prompt": "a"}', "prompt"),
    (b'{"text": "a", "input_ids": [1]}', "exactly one"),
    (b'{"text": 3}', "text is a int"),
    (b'{"text": ""}', "text is empty"),
    (b'{"messages": []}', "messages is empty"),
    (b'{"messages": {}}', "not a list"),
    (b'{"messages": ["a"]}', "not an object"),
    (b'{"messages": [{"role": "robot", "content": "a"}]}', "unknown role 'robot'"),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', "unknown role"),
    (b'{"messages": [{"role": "user"}]}', "content is missing"),
    (b'{"messages": [{"role": "user", "content": [1]}]}', "content[0] is a int"),
    (b'{"messages": [{"role": "user", "content": "a", "weight": 2}]}', "weight is 2"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}',
     "cannot render tool_calls"),
    (b'{"messages": [{"role": "user", "content": "a"}], "tools": "x"}', "tools"),
    (b'{"input_ids": []}', "input_ids"),
    (b'{"input_ids": [true]}', "input_ids"),
    (b'{"input_ids": [1, 2], "labels": [1]}', "2 input_ids but 1 labels"),
    (b'{"input_ids": [1, 2], "labels": [2, -100]}', "not to be shifted"),
    (b'{"input_ids": [1, -7]}', "-7 is outside"),
    (b'{"input_ids": [1, 2000]}', "2000 is outside"),
]


@pytest.mark.parametrize("line, reason", BAD)
def test_a_bad_line_is_named(make_tokenizer, write, line, reason):
    file, tokenizer = write({"text": "good"}, line, {"text": "good too"}), make_tokenizer(CHATML)
    with pytest.raises(BadLine) as error:
        read_samples(file, tokenizer, 64, vocab_size=1500)
    assert error.value.line == 2 and reason in error.value.reason and str(error.value).startswith(f"{file}:2: ")
    samples, stats = read_samples(file, tokenizer, 64, on_bad="skip", vocab_size=1500)
    assert len(samples) == 2 and stats.bad == 1 and reason in str(stats)


def test_a_template_whose_prompt_is_not_how_turns_begin_is_refused(make_tokenizer, write):
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nSure: {% endif %}")
    with pytest.raises(BadLine, match=r"generation prompt after messages\[:2\]"):
        read_samples(write({"messages": TALK}), make_tokenizer(template), 64)


def test_wrong_arguments(make_tokenizer, write):
    file = write({"messages": TALK})
    for tokenizer in (make_tokenizer(None), None):
        with pytest.raises(ValueError, match="chat template"):
            read_samples(file, tokenizer, 64)
    with pytest.raises(ValueError, match="on_bad='ignore'"):
        read_samples(file, None, 64, on_bad="ignore")
    with pytest.raises(ValueError, match="seq_len=1"):
        read_samples(file, None, 1)


KEYS = st.sampled_from(["messages", "text", "input_ids", "labels", "role", "content"])
SCALARS = st.none() | st.booleans() | st.integers(-9,
                                                  10**20) | st.text(max_size=5) | st.sampled_from(["user", "assistant"])
JSON = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=3))
JUNK = st.binary(max_size=40).map(lambda b: b.replace(b"\n", b" ")) | JSON.map(lambda x: json.dumps(x).encode())
GOOD = st.text(string.printable + "é漢🙂\u2028", max_size=9)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(JUNK, GOOD), max_size=6))
def test_no_line_crashes_and_no_good_line_is_lost(make_tokenizer, write, drawn):
    tokenizer = make_tokenizer(CHATML)
    wanted = [f"good {i}: {text}" for i, (_, text) in enumerate(drawn)]
    lines = [line for (junk, _), text in zip(drawn, wanted, strict=True)
             for line in (junk, json.dumps({"text": text}, ensure_ascii=False).encode())]
    samples, stats = read_samples(write(*lines), tokenizer, 256, on_bad="skip")
    assert [t for s in samples if (t := tokenizer.decode(s.ids[:-1])).startswith("good ")] == wanted
    assert stats.lines == len(lines) and stats.bad + stats.samples + stats.without_loss >= len(lines)


def test_an_encoder_goes_to_other_processes_and_says_what_it_depends_on(make_tokenizer):
    encoder, line = Encoder(make_tokenizer(CHATML)), json.dumps({"messages": TALK}).encode()
    before, here = encoder.fingerprint, encoder(line)
    for other in (pickle.loads(pickle.dumps(encoder)), Encoder(make_tokenizer(CHATML))):
        there = other(line)
        assert [(x.ids.tolist(), x.mask.tolist()) for x in there] == [(x.ids.tolist(), x.mask.tolist()) for x in here]
        assert other.fingerprint == before == encoder.fingerprint and here[0].ids.dtype == "int32"
    changed = make_tokenizer(CHATML)
    changed.add_tokens(["hello"])
    for other, key in ((Encoder(make_tokenizer(MARKED)), "template"), (Encoder(changed), "tokenizer"),
                       (Encoder(encoder.tokenizer, train_on_everything=True), "options"),
                       (Encoder(encoder.tokenizer, vocab_size=10_000), "options")):
        assert {k for k in before if other.fingerprint[k] != before[k]} == {key}


def test_long_documents_are_split_and_long_chats_are_not(make_tokenizer):
    encoder = Encoder(make_tokenizer(CHATML))
    records = [{"text": "a"}, {"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}, {"messages": TALK}]
    assert [[x.splittable for x in some] for some in encoder.many(records)] == [[True], [True], [False], [False]]
