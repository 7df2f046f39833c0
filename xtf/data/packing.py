"""Best-fit-decreasing packing of ragged samples into fixed budgets of tokens.

Each sample, longest first, goes into the fullest pack that still has room for it (Johnson, "Near-optimal bin packing
algorithms", 1973: never more than 11/9 of the optimum and a constant).
"""
from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], seq_len: int, max_documents: int) -> list[list[int]]:
    """Packs of indices into `lengths`, each of at most `seq_len` tokens and with room for a padding document.

    Open packs are kept in buckets by room left; only as many distinct rooms exist as there are positions, so that a
    bisection of the sorted rooms finds the best one.

    Raises ValueError for a length outside 1..seq_len, or if `max_documents` leaves no place for padding (below 2).

    >>> best_fit([3, 6, 2, 5], seq_len=8, max_documents=4)
    [[1, 2], [3, 0]]
    """
    if max_documents < 2:
        raise ValueError(f"max_documents={max_documents}: has to be at least 2, since padding is a document too")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> indices of packs, the last of which is filled next
    rooms: list[int] = []                  # the keys of open_packs, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = int(lengths[index])
        if not 1 <= n <= seq_len:
            raise ValueError(f"sample {index} has {n} tokens, outside 1..seq_len={seq_len}: truncate or split it first")
        at = bisect_left(rooms, n)
        if at == len(rooms):
            room, p = seq_len, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            p = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[at]
        packs[p].append(index)
        room -= n
        if room and len(packs[p]) < max_documents - 1:
            if room not in open_packs:
                open_packs[room] = []
                insort(rooms, room)
            open_packs[room].append(p)
    return packs


def efficiency(packs: Sequence[Sequence[int]], lengths: Sequence[int], seq_len: int) -> float:
    """The fraction of the packs' positions that hold tokens of samples rather than padding.

    >>> efficiency([[1, 2], [3, 0]], [3, 6, 2, 5], seq_len=8)
    1.0
    """
    return sum(int(lengths[i]) for p in packs for i in p) / max(1, len(packs) * seq_len)
