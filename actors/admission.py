"""Whether the engine can run what is being packed: where the two rooms meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class EngineExaminer:
    """Obeys `loaders.conversion.Examiner`: a model that the engine cannot run is refused before it is packed, and so is
    a way of making vectors that is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def configuration(self, config: Any) -> None:
        """What the architecture alone tells."""
        from models.pooling import read_pooling
        from models.trial import check_configuration

        self._ask(check_configuration, config)
        self._ask(lambda config: read_pooling(self._directory, config, encoder=False), config)

    def module(self, model: Any) -> None:
        """A trial with the model's own weights."""
        from models.trial import try_engine

        self._ask(try_engine, model)

    def encoder(self, model: Any) -> None:
        """A trial of a padded batch, pooled as the checkpoint says."""
        from models.embedding import try_encoder
        from models.pooling import read_pooling

        self._ask(lambda model: try_encoder(model, read_pooling(self._directory, model.config, encoder=True)), model)

    def _ask(self, question: Callable[[Any], object], subject: Any) -> None:
        from loaders import CheckpointError
        from models.errors import ModelError

        try:
            question(subject)
        except ModelError as error:
            raise CheckpointError(f"{self._directory}: {error}") from error
