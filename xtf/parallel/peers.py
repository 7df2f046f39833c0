"""Ranks that agree on how to go on, by messages of their own beside the collectives of a training step."""
import contextlib
import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

FOREGROUND, BACKGROUND = 1, 2  # tags: two threads of a rank may talk at the same time


class Peers:
    """Agreement between all ranks, or the given ones, over private gloo connections shaped as a star: whoever dies, the
    first rank hears of it and tells the others.

    (In a ring the survivors would wait for each other until the timeout.) Only the members make it, those of the same
    ranks in the same order. `lead` says whether this rank is the first.

    Raises ValueError if this rank is not among `ranks`.

    >>> Peers().tell("the answer", lambda: 42)
    42
    """

    def __init__(self, ranks: Sequence[int] | None = None, timeout: float = 1800.0):
        on = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if on else (0, 1)
        self.ranks = tuple(range(self.world) if ranks is None else sorted(ranks))
        self.timeout, self.lead = timeout, self.rank == self.ranks[0]
        if self.rank not in self.ranks:
            raise ValueError(f"rank {self.rank} is no peer of ranks {list(self.ranks)}")
        self.star: Any = _star(self.ranks, self.rank, timeout) if len(self.ranks) > 1 else None

    def agree(self, what: str, *, value: Any = None, error: BaseException | None = None, tag: int = FOREGROUND) -> Any:
        """Every rank comes here, and goes on only if all are well; returns the first rank's `value` (plain JSON).

        Raises `error` itself where it is given, elsewhere ValueError, OSError or RuntimeError naming the ranks that
        failed and why, and ConnectionError naming one that is gone.
        """
        failed: list[Any] = [] if error is None else [(self.rank, _kind(error), str(error) or repr(error))]
        if self.lead:
            there = []
            for rank in self.ranks[1:]:
                try:
                    at, said = self._receive(rank, tag)
                except RuntimeError as e:
                    failed.append(self._gone(rank, e))
                    continue
                there.append(rank)
                failed += said
                if at != what:
                    failed.append((rank, "RuntimeError",
                                   f"is at {at!r}, not at {what!r}: the ranks did not make the same calls"))
            answer = _encoded([value, failed])
            for rank in there:
                with contextlib.suppress(RuntimeError):                  # gone since: the next agreement will say so
                    self._send(answer, rank, tag)
        else:
            try:
                self._send(_encoded([what, failed]), self.ranks[0], tag)
                value, failed = self._receive(self.ranks[0], tag)
            except RuntimeError as e:
                failed = [self._gone(self.ranks[0], e)]
        if error is not None:
            raise error
        if failed:
            kinds = {kind for _, kind, _ in failed}
            kind = (ConnectionError if "gone" in kinds else ValueError if kinds == {"ValueError"} else
                    OSError if kinds <= {"OSError", "ValueError"} else RuntimeError)
            raise kind(f"{what}: " + "; ".join(f"rank {rank}: {text}" for rank, _, text in failed))
        return value

    def tell(self, what: str, fn: Callable[[], Any]) -> Any:
        """The first rank's `fn()`, on every rank: plain JSON, in which tuples have become lists."""
        value = failed = None
        try:
            value = json.loads(json.dumps(fn())) if self.lead else None
        except Exception as e:
            failed = e
        return self.agree(what, value=value, error=failed)

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All ranks leave this block in the same way: if one of them raised, all raise."""
        failed = None
        try:
            yield
        except Exception as e:
            failed = e
        self.agree(what, error=failed)

    def close(self) -> None:
        """Let go of the others."""
        self.star = None

    def _send(self, message: torch.Tensor, to: int, tag: int) -> None:
        for part in (torch.tensor([len(message)]), message):
            self.star.send([part], self.ranks.index(to), tag).wait()

    def _receive(self, source: int, tag: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        self.star.recv([size], self.ranks.index(source), tag).wait()
        text = torch.zeros(int(size), dtype=torch.uint8)
        self.star.recv([text], self.ranks.index(source), tag).wait()
        return json.loads(bytes(text.numpy()))

    def _gone(self, rank: int, e: RuntimeError) -> tuple[int, str, str]:
        return rank, "gone", f"is gone, or was silent for {self.timeout:g} s ({' '.join(str(e).split())[:120]})"


_made: Counter[tuple[int, ...]] = Counter()


def _star(ranks: tuple[int, ...], rank: int, timeout: float) -> Any:
    """Connections between some ranks, which others need not know of.

    dist.new_group would have to be called by all ranks; with use_local_synchronization its name, by which the members
    find each other, counts the groups that a rank is in, and those may be more on one member than on another.
    """
    _made[ranks] += 1
    name = hashlib.blake2b(f"{ranks}, {_made[ranks]}".encode(), digest_size=12).hexdigest()
    store = dist.PrefixStore(f"xtf/peers/{name}", dist.distributed_c10d._get_default_store())
    return dist.ProcessGroupGloo(store, ranks.index(rank), len(ranks), datetime.timedelta(seconds=timeout))


def _encoded(message: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def _kind(error: BaseException) -> str:
    return next((k.__name__ for k in (ValueError, OSError) if isinstance(error, k)), "RuntimeError")
