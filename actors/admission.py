"""Whether the engine can run what is being packed: where the two rooms meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class EngineExaminer:
    """Obeys `loaders.conversion.Examiner`: a decoder that the engine cannot run is refused before it is packed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def configuration(self, config: Any) -> None:
        """What the architecture alone tells."""
        from models.trial import check_configuration

        self._ask(check_configuration, config)

    def module(self, model: Any) -> None:
        """A trial with the model's own weights."""
        from models.trial import try_engine

        self._ask(try_engine, model)

    def _ask(self, question: Callable[[Any], None], subject: Any) -> None:
        from loaders import CheckpointError
        from models.errors import ModelError

        try:
            question(subject)
        except ModelError as error:
            raise CheckpointError(f"{self._directory}: {error}") from error
