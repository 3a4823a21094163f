"""Stop strings in a stream of text pieces."""

from __future__ import annotations


class StopFilter:
    """Lets text through until a stop string appears, also one that arrives in several pieces.

    Text that may become a stop string is held back until it is certain that it will not; the stop string and what
    follows it are never shown. What is shown follows from the pieces alone. Holds less text than the longest stop
    string; each piece costs its own length times the stop strings. While it is not `armed`, what is complete is text
    like any other; a stop string that begins there and is complete later counts.
    """

    __slots__ = ("_held", "_stops", "stopped")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str, *, armed: bool = True) -> str:
        """Take the next piece and return what may be shown now."""
        if self.stopped or not piece:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        # The one that is complete first counts, so that the pieces' borders change nothing.
        complete = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0] if armed else []
        if complete:
            self.stopped = True
            self._held = ""
            return text[: min(complete)[1]]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The answer is over: return what was held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a beginning of `stop` and not all of it."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
