"""A run as one picture and one page: `python -m xtf.report OUT [OUT ...] [--to DIR]`. See `xtf.run.report`."""
import sys

from xtf.run.report import INK, PANELS, Run, draw, main, page, read, smooth, summary, table, thin, write

__all__ = ["INK", "PANELS", "Run", "draw", "main", "page", "read", "smooth", "summary", "table", "thin", "write"]

if __name__ == "__main__":
    sys.exit(main())
