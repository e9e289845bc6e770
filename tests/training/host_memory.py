"""How much memory of its own a process takes while it makes a network ready for training: in pages that no file backs."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def own_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def peak_bytes() -> Iterator[Callable[[], int]]:
    """Afterwards, by how much the process had grown at most; looked at every millisecond."""
    gc.collect()
    before = peak = own_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, own_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak - before
    finally:
        done.set()
        thread.join()
