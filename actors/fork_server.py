"""Imported by the process from which a node forks its workers, before anything else: it ends when the node does.

The fork server of `multiprocessing` outlives its parent while a child is left, and what it forked outlives it. So it
asks the kernel to be killed when the node's main thread, which made it, is gone, and workers ask the same about it.
"""

from __future__ import annotations

import importlib

from bus.lifeline import end_with_parent

end_with_parent()
importlib.import_module("actors.worker_preload")
