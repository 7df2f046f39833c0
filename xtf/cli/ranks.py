"""What a rank does whatever the flags: speak, take values in, and end."""
import os
import sys
from collections.abc import Callable

import torch

from xtf import device, tree
from xtf.parallel import Overflow, is_main


def say(text: str) -> None:
    """Print, on rank 0."""
    if is_main():
        print(text, flush=True)


def on_device(values: tree.Tree) -> tree.Tree:
    """The tree on this process's device; DTensors are there already."""
    where = device.device()
    move = lambda x: x.detach().to(where, non_blocking=True).requires_grad_(x.requires_grad)
    return tree.tree_map(lambda x: x if x.device.type == where.type else move(x), values)


def run(main: Callable[[], None]) -> None:
    """Run a recipe's main; what a user can mend is one line on stderr and exit status 1."""
    code = 0
    try:
        main()
    except (ValueError, OSError, Overflow) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = 1
    except SystemExit as e:  # a signal's, once all is saved; or flags that are wrong
        if not isinstance(e.code, int | None):
            print(e.code, file=sys.stderr, flush=True)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    if torch.distributed.is_initialized():
        if code == 0:
            torch.distributed.barrier()
        sys.stdout.flush()
        # gloo's threads may abort an interpreter that takes itself apart (seen once in 8 runs of two ranks)
        os._exit(code)
    if code:
        raise SystemExit(code)
