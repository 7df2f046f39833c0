"""What the model is trained on, for the eye: `--show-batch` prints tokens coloured by loss."""
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from xtf.data.batch import Batch, Sample

TRAINED, CONTEXT = "black on green", "dim"
VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\0": "␀"})


def show(what: Sample | Batch, tokenizer: Any = None, console: Console | None = None, max_tokens: int = 2000) -> None:
    """Print a sample, or each document of a batch; tokens that carry loss are green, and marked ▏ where they begin.

    Each document gets a heading with its tokens and how many of them carry loss; of long ones the middle is left out.
    Without a tokenizer, ids are printed. Raises ValueError for a batch that was cut over sp.

    >>> show(Sample([5, 6, 7], [False, True, True]), console=Console(width=60, color_system=None))
    ─────── document 1: 3 tokens, 2 with loss (▏ begins) ───────
    5 ▏6 7▕
    """
    console = console or Console()
    if not isinstance(what, Batch):
        _document(what[0], what[1], "document 1", tokenizer, console, max_tokens)
        return
    packs = zip(what.input_ids, what.labels, what.loss_mask, what.segments, strict=True)
    for pack, (ids_T, labels_T, mask_T, segments_S) in enumerate(packs):
        if len(labels_T) != len(ids_T):
            raise ValueError(f"labels hold {len(labels_T)} of the pack's {len(ids_T)} positions: show the batch "
                             "before it is cut over sp")
        bounds = sorted(set(segments_S.tolist()))
        for number, (start, stop) in enumerate(pairwise(bounds), 1):
            on = torch.zeros(stop - start, dtype=torch.bool)
            on[1:] = mask_T[start:stop - 1].cpu() > 0        # the mask stands at the position that predicts
            name = f"pack {pack + 1}, document {number}"
            if stop == len(ids_T) and not on.any() and not ids_T[start:stop].any():
                console.rule(f"pack {pack + 1}: {stop - start} positions of padding", style="dim")
            else:
                _document(ids_T[start:stop], on, name, tokenizer, console, max_tokens)


def _document(ids: Any, mask: Any, name: str, tokenizer: Any, console: Console, max_tokens: int) -> None:
    ids, mask = torch.as_tensor(ids).tolist(), [bool(x) for x in mask]
    console.rule(f"{name}: {len(ids):,} tokens, {sum(mask):,} with loss (▏ begins)")
    text, before = Text(), False
    for piece, on in _pieces(ids, mask, tokenizer, max_tokens):
        bar = "▏" if on and not before else "▕" if before and not on else ""
        text.append(bar + piece.translate(VISIBLE), style=TRAINED if on else CONTEXT)
        before = on
    console.print(text.append("▕" if before else ""), soft_wrap=True)


def _pieces(ids: Sequence[int], mask: Sequence[bool], tokenizer: Any, max_tokens: int) -> Iterator[tuple[str, bool]]:
    """Stretches of text and whether they carry loss."""
    if len(ids) > max_tokens:
        head, tail = max_tokens - max_tokens // 2, max_tokens // 2
        yield from _pieces(ids[:head], mask[:head], tokenizer, max_tokens)
        yield f" … {len(ids) - max_tokens:,} tokens … ", False
        yield from _pieces(ids[len(ids) - tail:], mask[len(mask) - tail:], tokenizer, max_tokens)
        return
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            part = ids[start:i]
            space = "" if i == len(ids) or tokenizer is not None else " "
            yield (" ".join(map(str, part)) if tokenizer is None else tokenizer.decode(
                part, skip_special_tokens=False, clean_up_tokenization_spaces=False)) + space, mask[start]
            start = i
