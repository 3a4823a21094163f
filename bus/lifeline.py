"""Processes that must not outlive the one that made them (Linux; elsewhere nothing happens).

The kernel ties a child to the thread that made it: start children from one that lives as long as they shall.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that made it is gone."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:  # it was gone before the kernel knew
        os._exit(1)


def ending_with_parent() -> Callable[[], None] | None:
    """What a child does between fork and exec, to get SIGTERM when its parent is gone: a `preexec_fn`.

    The library is loaded here because a fork may not.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return prepare
