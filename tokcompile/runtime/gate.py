"""Calls of several threads: graphs run side by side, and are made one at a time.

Tracing changes the process for as long as it lasts: it patches ``nn.Module`` and sets flags that Dynamo reads. Another
thread that traces, or that calls what is compiled, would fail or run uncompiled in the meantime. So a call first runs
*shared*, with the graphs that there are; where one is missing it says :class:`Missing`, and runs once more *alone*.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.convert_frame import compile_lock


class Missing(BaseException):
    """A shared call needs a graph that is not there yet. Not an ``Exception``: model code must not catch it."""


class Gate:
    """Any number of threads inside :meth:`shared`, or one inside :meth:`alone`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._waiting = 0
        self._alone = False
        self._of = threading.local()

    @property
    def may_compile(self) -> bool:
        """Whether this thread is not inside a shared call."""
        return getattr(self._of, "mode", "") != "shared"

    @property
    def captures(self) -> bool:
        """Whether this thread is making a graph."""
        return bool(getattr(self._of, "mode", "") == "alone")

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        if getattr(self._of, "mode", ""):  # inside another call of this thread
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._running += 1
        self._of.mode = "shared"
        try:
            yield
        finally:
            self._of.mode = ""
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """
        Raises:
            Missing: this thread is inside a shared call, and has to leave it first.
        """
        mode = getattr(self._of, "mode", "")
        if mode == "shared":
            raise Missing
        if mode == "alone":
            yield
            return
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._alone and not self._running)
                self._alone = True
            finally:
                self._waiting -= 1
        self._of.mode = "alone"
        try:
            with compile_lock:  # whatever else of this process is being compiled by Dynamo
                yield
        finally:
            self._of.mode = ""
            with self._changed:
                self._alone = False
                self._changed.notify_all()


#: One for the process: what tracing patches is the process's, whichever model is traced.
GATE = Gate()


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def captures() -> bool:
    """Whether what Dynamo traces here becomes a graph of tokcompile's; asked while it traces."""
    return GATE.captures


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def apart(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call that a ``torch.compile`` of the user leaves out of its graph, which would take the dense model."""
    return function(*args, **kwargs)
