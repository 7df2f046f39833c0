"""What a layout costs, before anyone rents it: one real sharded step over tensors without numbers, as one of any ranks.

    python -m xtf.plan MODEL_DIR --world 1024 --mesh dp=16,ep=32,sp=2 --seq-len 4096 --remat
    python -m xtf.plan MODEL_DIR --world 64 --machine h200 --search

MODEL_DIR needs its config.json alone; a model's id on the hub does, too.
"""
import math
import sys

import msgspec
import tyro

from xtf.layout import parse_mesh
from xtf.plan._report import Flags, report, table, text, ways
from xtf.plan._search import search


def main(argv: list[str] | None = None) -> None:
    """Run `python -m xtf.plan`."""
    flags = tyro.cli(Flags, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    try:
        if not flags.search:
            sizes = parse_mesh(flags.mesh) or {"dp": flags.world}
            if math.prod(sizes.values()) != flags.world:
                raise ValueError(f"--mesh {flags.mesh}: the sizes multiply to {math.prod(sizes.values())}, --world is "
                                 f"{flags.world}; make them agree")
            found = [report(flags, sizes, flags.remat)]
            print(msgspec.json.encode(found[0]).decode() if flags.json else table(found[0]))
            return
        if flags.mesh:
            raise ValueError(f"--mesh {flags.mesh}: --search tries all meshes of --world; leave one of them out")
        found = search(flags)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None
    if flags.json:
        print(msgspec.json.encode(found).decode())
    elif not found:
        raise SystemExit(f"no mesh of {flags.world} ranks fits; take more ranks, a shorter --seq-len or fewer bytes "
                         "of --moments")
    for r in found if not flags.json else ():
        print(f"{r.tokens_per_second_per_device:>10,.0f} tokens/s a device{r.peak / 1e9:>9.1f} GB   "
              f"{', '.join([text(r.mesh), *ways(r)[1:]])}")
