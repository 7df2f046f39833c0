"""Files that one process at a time holds: the kernel frees them when their holder ends, however it ends."""
import fcntl
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import TextIO


def hold(file: TextIO, wait: float = math.inf, refused: Callable[[str], str] = str,
         waiting: Callable[[str], None] = lambda owner: None) -> TextIO:
    """`file`, opened with "a+", held until it is closed; it says who holds it, or what its holder notes in it.

    Meanwhile `waiting` is told what the other holder has written, whenever that changes.

    Raises OSError(refused(what the other has written)) if the other still holds it after `wait` seconds.

    >>> import tempfile
    >>> path = tempfile.mktemp()
    >>> with hold(open(path, "a+")):
    ...     hold(open(path, "a+"), wait=0.0, refused=lambda owner: f"in use by {owner}")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    OSError: in use by process ...
    """
    deadline, seen = time.monotonic() + wait, None
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as e:
                file.seek(0)
                owner = file.read().strip()
                if time.monotonic() >= deadline:
                    raise OSError(refused(owner or "an unknown process")) from e
                if owner != seen:
                    seen = owner
                    waiting(owner)
                time.sleep(0.1)
        note(file, f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}: "
                   f"{' '.join(sys.argv)[:200]}")
    except BaseException:
        file.close()
        raise
    return file


def note(file: TextIO, text: str) -> None:
    """Let `text` be what a file says that this process holds."""
    file.truncate(0)
    file.write(text)
    file.flush()
