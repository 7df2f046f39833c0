"""Work done ahead in a background thread, a few items at a time."""
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from xtf import device, tree

T = TypeVar("T")


def prefetch(make: Callable[[], Iterator[T]], depth: int = 2) -> Iterator[T]:
    """The items of `make()`, which runs in a thread that is at most `depth` items ahead.

    The thread starts with the first item asked for, and ends when the iterator is closed, dropped or at its end. What
    it raises is raised here, after the items before it.

    >>> list(prefetch(lambda: iter([1, 2, 3])))
    [1, 2, 3]
    """
    ready: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    slots, closed = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        try:
            items = make()
            while True:
                slots.acquire()
                if closed.is_set():
                    return
                ready.put(("item", next(items)))
        except StopIteration:
            ready.put(("end", None))
        except BaseException as e:  # whatever it is, it belongs to whoever waits for the item
            ready.put(("error", e))

    thread = threading.Thread(target=work, name="xtf-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            slots.release()
            yield value
    finally:
        closed.set()
        slots.release()
        thread.join()


def pinned(items: Iterator[tree.Tree], index: int | None) -> Iterator[tree.Tree]:
    """Trees of tensors in memory from which accelerator `index` copies while it computes; as they are for None."""
    if index is not None:
        import torch
        torch.accelerator.set_device_index(index)  # a new thread begins on device 0, and would make a context there
    for item in items:
        yield item if index is None else tree.tree_map(lambda x: x.pin_memory(), item)


def accelerator_index() -> int | None:
    """This process's accelerator, or None on a CPU.

    >>> accelerator_index() is None or accelerator_index() >= 0
    True
    """
    where = device.device()
    return None if where.type == "cpu" else where.index
