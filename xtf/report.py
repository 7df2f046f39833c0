"""A run as one picture and one page: the command `python -m xtf.report OUT [OUT ...] [--to DIR]` (the code is in
`xtf.run.report`)."""
import sys

from xtf.run.report import draw, main, page, read, write

__all__ = ["draw", "main", "page", "read", "write"]

if __name__ == "__main__":
    sys.exit(main())
