"""What --show-batch prints: all the text, the trained part told apart, each document by itself."""
import pytest
from rich.console import Console

from tests.data.templates import FAMILIES, tokenizer_for
from xtf.data import Sample, pack
from xtf.data.chat import Encoder
from xtf.data.show import show

TALK = [{"role": "user", "content": "Where\tis Orléans — 六?"},
        {"role": "assistant", "content": "In France.\nSur la Loire ½."}]


def printed(what, tokenizer=None, color=None, **options) -> str:
    console = Console(width=100, color_system=color, force_terminal=color is not None, record=True,
                      file=open("/dev/null", "w"))
    with console.file:
        show(what, tokenizer, console, **options)
    return console.export_text(styles=color is not None)


def test_the_trained_text_stands_between_the_bars(make_tokenizer):
    tokenizer = tokenizer_for(FAMILIES["smollm2"], make_tokenizer)
    ids, mask, _ = Encoder(tokenizer)({"messages": TALK})[0]
    heading, text = printed(Sample(ids, mask), tokenizer).split("\n", 1)
    assert f"{len(ids)} tokens, {mask.sum()} with loss" in heading
    assert text.rstrip("\n").endswith("assistant⏎\n▏In France.⏎\nSur la Loire ½.<|im_end|>▕")
    assert text.count("▏") == text.count("▕") == 1
    bare = text.replace("⏎", "").replace("▏", "").replace("▕", "").replace("⇥", "").rstrip("\n")
    assert bare.split() == tokenizer.decode(ids).split()


def test_colour_follows_the_loss(make_tokenizer):
    text = printed(Sample([5, 6, 7, 8], [False, True, True, False]), color="standard")
    assert "\x1b[30;42m▏6 7 " in text and "\x1b[2m5 " in text and "\x1b[2m▕8" in text


def test_each_document_of_a_batch(make_tokenizer):
    batch = pack([Sample([5, 6, 7, 1], [False, True, True, False]), Sample([8, 9], [False, True])], seq_len=10,
                 max_documents=4)
    lines = printed(batch).splitlines()
    assert "pack 1, document 1: 4 tokens, 2 with loss" in lines[0] and lines[1] == "5 ▏6 7 ▕1"
    assert "pack 1, document 2: 2 tokens, 1 with loss" in lines[2] and lines[3] == "8 ▏9▕"
    assert "pack 1: 4 positions of padding" in lines[4] and len(lines) == 5


def test_the_middle_of_long_documents_is_left_out():
    text = printed(Sample(list(range(100)), [False] * 50 + [True] * 50), max_tokens=6)
    assert "0 1 2 … 94 tokens … ▏97 98 99▕" in text and "100 tokens, 50 with loss" in text


def test_a_batch_that_was_cut_is_refused():
    batch = pack([Sample([5, 6, 7, 1], [False, True, True, False])], seq_len=8, max_documents=4)
    half = type(batch)(batch.input_ids, batch.labels[:, :4], batch.loss_mask[:, :4], batch.positions, batch.segments)
    with pytest.raises(ValueError, match="before it is cut over sp"):
        show(half, None, Console())
