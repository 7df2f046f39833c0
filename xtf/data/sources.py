"""From what `--data` says to training and held-out data: sources with weights, tokenised and split at seq_len."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtf.data.cache import Say, tokenized
from xtf.data.chat import Encoder
from xtf.data.dataset import Dataset
from xtf.data.loader import split_off
from xtf.data.mix import Source

CACHE = "~/.cache/xtf"


def parse_sources(data: Sequence[str]) -> list[tuple[str, float | None]]:
    """(what to read, weight or None) of each source.

    Raises ValueError where some have a weight and some do not, a weight is not above 0, or a source is named twice.

    >>> parse_sources(["web/=0.7", "code/=0.3"]), parse_sources(["a=b.jsonl"])
    ([('web/', 0.7), ('code/', 0.3)], [('a=b.jsonl', None)])
    """
    out: list[tuple[str, float | None]] = []
    for text in data:
        name, _, tail = text.rpartition("=")
        try:
            out.append((name, float(tail)) if name and not Path(text).exists() else (text, None))
        except ValueError:  # a file that has = in its name, as one that exists may
            out.append((text, None))
    if not out:
        raise ValueError("--data: names nothing to train on")
    weights = [w for _, w in out if w is not None]
    if weights and len(weights) < len(out):
        raise ValueError(f"--data {' '.join(data)}: give every source a weight (SOURCE=0.3) or none")
    if any(not 0 < w < float("inf") for w in weights):
        raise ValueError(f"--data {' '.join(data)}: weights have to be above 0")
    if len({name for name, _ in out}) < len(out):
        raise ValueError(f"--data {' '.join(data)}: names a source twice; to see one more often give weights")
    return out


def open_data(data: Sequence[str], encoder: Encoder, seq_len: int, *, eval_data: Sequence[str] = (),
              eval_fraction: float = 0.0, seed: int = 0, folder: str | Path = CACHE, on_bad: str = "raise",
              workers: int | None = None, say: Say = lambda text: None) -> tuple[Any, Any]:
    """(training, held-out) data for `Loader`, `eval_batches`: a `Dataset` each, or `Source`s where `data` has weights.

    Without weights all of `data` is one source, in which each sample comes once an epoch. With them (`web/=0.7
    code/=0.3`) each source has its share of the tokens. Held out are `eval_data` or, drawn by seed, `eval_fraction` of
    each source's records; an empty list if neither is given. Every rank calls it; `say` (rank 0's, say) is told what
    became of the lines.

    Raises what `tokenized` does, and ValueError if nothing is left to train on or to hold out.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "data.jsonl"
    ...     _ = file.write_text('{"input_ids": [5, 6, 7]}\\n' * 10)
    ...     train, held_out = open_data([str(file)], Encoder(None), seq_len=8, eval_fraction=0.2, folder=folder)
    >>> len(train), len(held_out)
    (8, 2)
    """
    def read(names: str | Sequence[str]) -> Dataset:
        found = tokenized(names, encoder, folder=folder, on_bad=on_bad, workers=workers, say=say).at(seq_len)
        say(f"{names if isinstance(names, str) else ' '.join(names)}: {found.stats}")
        return found

    sources = parse_sources(data)
    weighted = sources[0][1] is not None
    made = [Source(name, read(name), weight) for name, weight in sources if weight]
    made = made or [Source("", read([name for name, _ in sources]))]
    for source in made:
        if not len(source.data):
            raise ValueError(f"--data {source.name or ' '.join(data)}: no sample to train on: every line was empty, "
                             f"skipped or without a token that carries loss within --seq-len {seq_len}")
    held: list[Source] = []
    if eval_data:
        held = [Source("", read(list(eval_data)))]
        if not len(held[0].data):
            raise ValueError(f"--eval-data {' '.join(eval_data)}: no sample in it has a token that carries loss; "
                             "give another file or leave the flag out")
    elif eval_fraction:
        sides = [split_off(source.data, eval_fraction, seed) for source in made]
        made, held = ([s._replace(data=side[i]) for s, side in zip(made, sides, strict=True)] for i in (0, 1))
    single = lambda of: of[0].data if of and not weighted else of
    return single(made), (held[0].data if eval_data else single(held))
