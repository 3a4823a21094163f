"""What can go wrong with a model for reasons its user can mend."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be made, loaded or used; the message is one sentence that says what, where and what to do."""
