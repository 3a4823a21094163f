"""Which weights a store has said to lie on its SSD, so that it notices what somebody does there beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class KnownModels:
    """Models by name, each with the digest that was said last. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: dict[str, str] = {}
        """The digest; empty where a model was there once, vanished, and may come back."""
        self._suspected: dict[str, str] = {}

    def found(self, models: dict[str, str]) -> None:
        """These are all that lie there now."""
        with self._lock:
            self._said = dict.fromkeys(self._said, "") | models

    def add(self, model: str, digest: str) -> None:
        with self._lock:
            self._said[model] = digest

    def remove(self, model: str) -> None:
        """It goes, and nobody wonders."""
        with self._lock:
            self._said.pop(model, None)

    def differences(self, look: Callable[[str], str]) -> str:
        """What lies there as something else than was said, as a sentence, else empty. `look` tells the digest of what
        lies there under a name, empty for nothing that is of use.

        Said is what is seen twice: who packs a model anew tells the store of it a moment later. And it is said once.
        """
        with self._lock:
            said = dict(self._said)
        seen = {model: found for model, digest in said.items() if (found := look(model)) != digest}
        with self._lock:
            sure = [
                model
                for model, found in seen.items()
                if self._suspected.get(model) == found and self._said.get(model) == said[model]
            ]
            self._suspected = {model: found for model, found in seen.items() if model not in sure}
            for model in sure:
                self._said[model] = seen[model]
        return f"not on the SSD as this server said, and nobody told it: {', '.join(sure)}" if sure else ""
