"""From tokens to text, one token at a time, without ever showing half a character.

A token may hold a part of a character's bytes; decoders write U+FFFD for what is not a character (yet). A character
has at most four bytes, so at most the last three U+FFFD of a text can still turn into something else: these are held
back, everything before them is final. Text is always decoded from a window of the last few tokens, never from one
token alone, because decoders of the SentencePiece kind drop the space before the first token they see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_HELD_AT_MOST = 3
_KEPT = 10
_WINDOW_AT_MOST = 18

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Turns tokens into pieces of text; the pieces follow from prompt and tokens alone.

    `decode` gives the text of a list of tokens; `prompt` is what stands before the first token, its end serves as the
    first window. Every `push` decodes at most nineteen tokens, however long the answer is.
    """

    __slots__ = ("_decode", "_shown", "_window")

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window: list[int] = list(prompt[-_KEPT:])
        text = decode(self._window) if self._window else ""
        self._shown = len(text) - _held(text)

    def push(self, token: int) -> str:
        """Take the next token and return the text that became certain with it."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = len(text) - _held(text)
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if len(self._window) > _WINDOW_AT_MOST:
            self._shrink(text)
        return piece

    def peek(self, token: int) -> str:
        """The text that would become certain if this were the next token."""
        text = self._decode([*self._window, token])
        return text[self._shown : len(text) - _held(text)]

    def flush(self) -> str:
        """The answer is over: return what was held back, broken as it may be."""
        text = self._decode(self._window) if self._window else ""
        piece = text[self._shown :]
        self._shown = len(text)
        return piece

    def _shrink(self, text: str) -> None:
        # Positions are counted from the end: the text of the shorter window may begin differently (half a character,
        # a dropped space), but the last tokens give the same end.
        held = len(text) - self._shown
        del self._window[:-_KEPT]
        self._shown = max(0, len(self._decode(self._window)) - held)


def _held(text: str) -> int:
    return min(_HELD_AT_MOST, len(text) - len(text.rstrip(_BROKEN)))
