"""Ranks that agree on how to go on, by messages of their own beside the collectives of a training step."""
import contextlib
import datetime
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

BACKGROUND, FOREGROUND = 1, 2  # tags: two threads of a rank may talk at the same time


class Peers:
    """Agreement between ranks over a private gloo group shaped as a star: whoever dies, rank 0 hears of it and tells
    the others.

    (In a ring the survivors would wait for each other until the timeout.)
    """

    def __init__(self, timeout: float = 1800.0):
        on = dist.is_initialized()
        self.rank, self.world, self.timeout = (dist.get_rank(), dist.get_world_size(), timeout) if on else (0, 1, timeout)
        self.group: Any = dist.new_group(backend="gloo",
                                         timeout=datetime.timedelta(seconds=timeout)) if self.world > 1 else None

    def agree(self, what: str, *, value: Any = None, error: BaseException | None = None, tag: int = BACKGROUND) -> Any:
        """Every rank comes to this point, and goes on only if all are well; returns rank 0's `value` (plain JSON).

        Raises `error` itself where it is given, elsewhere ValueError, OSError or RuntimeError naming the ranks that
        failed, and ConnectionError naming one that is gone.
        """
        mine = {"what": what, "kind": _kind(error), "text": str(error) or repr(error), "value": value}
        said: dict[int, Any] = {self.rank: mine}
        if self.rank:
            try:
                self._send(mine, 0, tag)
                said = dict(self._receive(0, tag))
            except RuntimeError as e:
                said[0] = _gone(0, self.timeout, e)
        else:
            for rank in range(1, self.world):
                said[rank] = _attempt(lambda rank=rank: self._receive(rank, tag), rank, self.timeout)
                if said[rank]["what"] not in (what, None):
                    said[rank] |= {"kind": "RuntimeError",
                                   "text": f"is at {said[rank]['what']!r}: the ranks did not make the same calls"}
            for rank in [r for r in said if r and said[r]["what"] is not None]:
                _attempt(lambda rank=rank: self._send(list(said.items()), rank, tag), rank, self.timeout)
        if error is not None:
            raise error
        failed = {rank: message for rank, message in said.items() if message["kind"] is not None}
        if failed:
            kinds = {message["kind"] for message in failed.values()}
            text = f"{what}: " + "; ".join(f"rank {rank}: {message['text']}"
                                           for rank, message in sorted(failed.items()))
            raise (ConnectionError if "gone" in kinds else ValueError if kinds == {"ValueError"} else OSError
                   if kinds <= {"OSError", "ValueError"}
                   else RuntimeError)(text)
        return said[0]["value"]

    def tell(self, what: str, fn: Callable[[], Any], tag: int) -> Any:
        """Rank 0's `fn()`, on every rank."""
        value = failed = None
        try:
            value = fn() if self.rank == 0 else None
        except Exception as e:
            failed = e
        return self.agree(what, value=value, error=failed, tag=tag)

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All ranks leave this block in the same way: if one of them raised, all raise."""
        failed = None
        try:
            yield
        except Exception as e:
            failed = e
        self.agree(what, error=failed, tag=FOREGROUND)

    def close(self) -> None:
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    def _send(self, message: Any, to: int, tag: int) -> None:
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        dist.send(torch.tensor([len(text)]), to, group=self.group, tag=tag)
        dist.send(text, to, group=self.group, tag=tag)

    def _receive(self, source: int, tag: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, source, group=self.group, tag=tag)
        text = torch.zeros(int(size), dtype=torch.uint8)
        dist.recv(text, source, group=self.group, tag=tag)
        return json.loads(bytes(text.numpy()))


def _attempt(fn: Callable[[], Any], rank: int, timeout: float) -> Any:
    try:
        return fn()
    except RuntimeError as e:
        return _gone(rank, timeout, e)


def _gone(rank: int, timeout: float, e: RuntimeError) -> dict[str, Any]:
    return {"what": None, "kind": "gone",
            "text": f"is gone, or was silent for {timeout:g} s ({' '.join(str(e).split())[:120]})", "value": None}


def _kind(error: BaseException | None) -> str | None:
    return None if error is None else next((k.__name__ for k in (ValueError, OSError) if isinstance(error, k)),
                                           "RuntimeError")
