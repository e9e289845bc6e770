"""Signals and the end of the walltime: noticed here, acted on by the loop between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

import psutil


class Stopped(RuntimeError):
    """Training was asked to stop; its state is on disk and the same command continues."""


class Interruption:
    """While it is entered, SIGTERM asks to save and stop, SIGUSR1 to save and go on; so does the end of `minutes` since this
    process began (0: no limit), which stops. A SIGTERM that nothing stopped for goes to who handled it before."""

    def __init__(self, minutes: float = 0.0) -> None:
        began = psutil.Process(os.getpid()).create_time()
        self._deadline = began + 60 * minutes if minutes else float("inf")
        self._received: set[int] = set()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is None and signal.SIGTERM in self._received:  # in the last step, or while its state was written
            signal.raise_signal(signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)

    def asks_to_stop(self) -> bool:
        return signal.SIGTERM in self._received or time.time() >= self._deadline

    def asks_to_save(self) -> bool:
        """Once for every SIGUSR1."""
        asked = signal.SIGUSR1 in self._received
        self._received.discard(signal.SIGUSR1)
        return asked
