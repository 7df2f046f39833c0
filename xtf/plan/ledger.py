"""A ledger of one step over tensors that have shapes and no numbers: who holds memory when, and which work is done.

It is a FakeTensorMode that writes down what it is asked for, so nothing escapes it: a fake tensor finds its mode even
where all modes are switched off for a while.
"""
import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch
from torch.utils.flop_counter import flop_registry

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")
OURS = ("xtf", "c10d")  # what these operators allocate on the way they allocate where they run, too
FREE = ("detach", "alias", "lift_fresh", "record_stream", "resolve_conj", "all_sum", "all_to_all")


class Ledger(FakeTensorMode):
    """New tensors are fake under it. `peak` bytes were alive at once, `at_peak()`: by kind; `work` counts operators.

    `work` has a count for each (kind of work, FLOPs, bytes read and written); views and allocations are no work. Kinds:
    "products" (with weights), "experts" (grouped products), "attention", "optimizer" and "passes" (all else). What is
    made of real tensors alone stays real (so integers that decide about shapes may be given), and is counted. Memory
    inside an operator is not seen.

    >>> with Ledger() as ledger:
    ...     x = torch.empty(1024)
    ...     y = x + x
    ...     del x
    ...     z = y + y
    >>> ledger.peak, ledger.at_peak()["activations"], ledger.work[("passes", 0, 12288)]
    (8192, 8192, 2)
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.kind, self.work, self.limit = "activations", Counter(), math.inf
        self.now = self.peak = self._peak_at = self._depth = 0
        self._alive: dict[int, int] = {}                             # storage -> its number in the order of birth
        self._kinds: list[str] = []
        self._sizes: list[int] = []
        self._events: list[int] = []                                 # n: number n is born, ~n: it dies
        self._phases: list[int] = []                                 # where in the events each began

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside, kwargs, deeper = self._depth > 0, kwargs or {}, func.namespace not in OURS
        given = _tensors((args, kwargs))
        self._depth += deeper
        try:
            if given and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in given):
                with no_dispatch():
                    out = func(*args, **kwargs)
            elif not func._schema.returns:                           # it writes into what it was given
                out = None
            elif func.namespace == "aten" and given and all(map(self._on_meta, given)):
                # what FakeTensorMode would come to, without its cache, whose keys take longer than a meta kernel
                with in_kernel_invocation_manager(self):
                    out = func(*args, **kwargs)
                out = type(out)(map(self._faked, out)) if isinstance(out, list | tuple) else self._faked(out)
            else:
                out = super().dispatch(func, types, args, kwargs)
        finally:
            self._depth -= deeper
        if func.namespace == "c10d":
            self.mark("buffers", given)
            if "reduce_scatter" in func._schema.name and given[0].device.type == "cpu":
                for read in given[len(given) // 2:]:
                    self._enter(read.untyped_storage(), "buffers", copy=True)
        elif not inside and func.namespace != "prim" and out is not NotImplemented:
            results = _tensors(out)
            for t in results:
                self._see(t)
            known = {t.untyped_storage()._cdata for t in given}
            self._note(func, args, kwargs, given, out, [t for t in results if t.untyped_storage()._cdata not in known])
        return out

    def _on_meta(self, t: torch.Tensor) -> bool:
        return type(t) is FakeTensor and t.fake_device.type == "meta" and t.constant is None

    def _faked(self, x: Any) -> Any:
        """A result as a fake tensor; one that was an argument is that, and what is no tensor stays as it is."""
        return FakeTensor(self, x, x.device) if type(x) is torch.Tensor else x

    def _see(self, t: torch.Tensor, kind: str | None = None) -> bool:
        """Enter a tensor's memory, unless it is there; whether it was new."""
        storage = t.untyped_storage()
        return storage._cdata not in self._alive and self._enter(storage, kind)

    def _enter(self, storage: torch.UntypedStorage, kind: str | None, copy: bool = False) -> bool:
        """A storage's memory; or that of a copy that lives as long (gloo's reduce-scatter has one for its sums)."""
        key, size = -storage._cdata if copy else storage._cdata, storage.nbytes()
        number = self._alive[key] = len(self._kinds)
        self._kinds.append(kind or self.kind)
        self._sizes.append(size)
        self._events.append(number)
        self.now += size
        if self.now > self.peak:
            self.peak, self._peak_at = self.now, len(self._events)
            if self.peak > self.limit:
                raise MemoryError(f"{self.peak:,} bytes are alive at once, the limit is {self.limit:,.0f}")
        weakref.finalize(storage, self._gone, key).atexit = False
        return True

    def _gone(self, key: int) -> None:
        number = self._alive.pop(key)
        self._events.append(~number)
        self.now -= self._sizes[number]

    def _note(self, func: Any, args: Any, kwargs: Any, given: list, out: Any, fresh: list) -> None:
        name = func._schema.name.split("::")[1]
        if func.is_view or name in FREE or "empty" in name or not (fresh or func._schema.is_mutable):
            return
        written = [t for a, x in zip(func._schema.arguments, args, strict=False)
                   if a.alias_info and a.alias_info.is_write for t in _tensors(x)]
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func.namespace == "aten" and name.endswith("_"):             # in place
            formula = flop_registry.get(getattr(torch.ops.aten, name[:-1], None))
        if name.startswith("_flash_attention"):
            formula = self._flash
        elif name.startswith("_scaled_dot_product") and formula is None:
            formula = partial(self._masked, "backward" in name)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        self.work[self._label(name, flops), flops, sum(t.nbytes for t in (*given, *written, *fresh))] += 1

    def _flash(self, *args: Any, window_size_left: int | None = None, **_: Any) -> int:
        """FLOPs of flash attention, causal, over documents that are all as long as the longest: torch's formula knows
        neither masks nor windows, and reads lengths, which a fake tensor has none of."""
        backward = args[4].is_floating_point()  # grad, q, k, v, out...; forward has q, k, v, lengths
        (q, _, v), n = args[backward:3 + backward], args[5 + 3 * backward]
        w = n if window_size_left is None else min(window_size_left + 1, n)
        pairs = len(q) // n * (w * n - w * (w - 1) // 2)
        scores, values = (3, 2) if backward else (1, 1)              # products as wide as q and as v
        return 2 * pairs * q.shape[1] * (scores * q.shape[2] + values * v.shape[2])

    def _masked(self, backward: bool, *args: Any, **_: Any) -> int:
        """FLOPs of attention under a mask, hidden pairs included: of a CPU's kernel torch has no formula."""
        q, k, v = args[backward:3 + backward]
        scores, values = (3, 2) if backward else (1, 1)
        return 2 * math.prod(q.shape[:3]) * k.shape[2] * (scores * q.shape[3] + values * v.shape[3])

    def _label(self, name: str, flops: int) -> str:
        if not flops:
            return "optimizer" if self.kind == "optimizer" else "passes"
        return "products" if name in ("mm", "addmm") else "experts" if "grouped" in name else "attention"

    def start(self, limit: float = math.inf) -> None:
        """Forget work and peak: a step begins here. More than `limit` bytes from now on raise MemoryError."""
        self.limit, self.peak, self._peak_at = limit, self.now, len(self._events)
        self._phases = [len(self._events)]
        self.work.clear()

    def phase(self) -> None:
        """A part of the step ends here, and the next begins."""
        self._phases.append(len(self._events))

    @contextlib.contextmanager
    def entering(self, kind: str) -> Iterator[None]:
        """What is allocated within is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def mark(self, kind: str, tensors: Iterable[Any]) -> None:
        """These tensors' memory is of that kind from birth; parameters, gradients, optimizer state stay as they are."""
        for t in tensors:
            if isinstance(t, torch.Tensor) and not self._see(t, kind):
                number = self._alive[t.untyped_storage()._cdata]
                if self._kinds[number] in ("activations", "buffers"):
                    self._kinds[number] = kind

    def at_peak(self) -> dict[str, int]:
        """Bytes of each kind at the moment when most were alive."""
        return self._held([self._peak_at])[0]

    def peaks(self) -> list[dict[str, int]]:
        """As `at_peak`, of the first and of the second half of each phase."""
        ends, moments, now = [*self._phases, len(self._events)], [], 0
        halves = [at for a, b in pairwise(ends) for at in (a, (a + b) // 2)] + ends[-1:]
        totals = [0, *(now := now + (self._sizes[e] if e >= 0 else -self._sizes[~e]) for e in self._events)]
        for a, b in pairwise(halves):
            moments.append(max(range(a, b + 1), key=totals.__getitem__))
        return self._held(moments)

    def _held(self, moments: list[int]) -> list[dict[str, int]]:
        """Bytes of each kind after so many events each, which come in order."""
        held: dict[str, int] = dict.fromkeys(KINDS, 0)
        at, out = 0, []
        for moment in moments:
            for event in self._events[at:moment]:
                number = event if event >= 0 else ~event
                held[self._kinds[number]] += self._sizes[number] if event >= 0 else -self._sizes[number]
            at = max(at, moment)
            out.append(dict(held))
        return out


def _tensors(x: Any) -> list[torch.Tensor]:
    """The tensors among an operator's arguments or results (flat, or in lists)."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, list | tuple):
        return [t for y in x for t in _tensors(y)]
    return [t for y in x.values() for t in _tensors(y)] if isinstance(x, dict) else []
