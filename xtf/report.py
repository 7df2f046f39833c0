"""A run as one picture and one page: `python -m xtf.report OUT [OUT ...] [--to DIR]`; see `xtf.run.report`."""
import sys

from xtf.run.report import draw, main, page, read, write

__all__ = ["draw", "main", "page", "read", "write"]

if __name__ == "__main__":
    sys.exit(main())
