"""How `longshore ask` shows chunks: text as it comes, lines of tokens with logprobs, several answers one by one."""

from __future__ import annotations

import sys

import msgspec

from bus.replies import Chunk


class AskOutput:
    """Writes to standard output. With `several`, an answer is written when it has ended, under its number."""

    def __init__(self, *, as_json: bool, several: bool) -> None:
        self._as_json = as_json
        self._several = several
        self._kept: dict[int, list[str]] = {}
        self._open_line = False

    def show(self, chunk: Chunk) -> None:
        if self._as_json:
            sys.stdout.write(msgspec.json.encode(chunk).decode() + "\n")
        elif self._several:
            self._keep(chunk)
        else:
            text = text_of(chunk)
            sys.stdout.write(text)
            self._open_line = not text.endswith("\n") if text else self._open_line
        sys.stdout.flush()

    def _keep(self, chunk: Chunk) -> None:
        kept = self._kept.setdefault(chunk.choice, [])
        kept.append(text_of(chunk))
        if chunk.end:
            text = "".join(kept)
            sys.stdout.write(f"--- answer {chunk.choice + 1} of {chunk.n} ({chunk.end})\n{text}")
            sys.stdout.write("" if text.endswith("\n") else "\n")
            del self._kept[chunk.choice]

    def close(self) -> None:
        """Nothing more comes: what was begun is shown as far as it came."""
        for choice, kept in sorted(self._kept.items()):
            sys.stdout.write(f"--- answer {choice + 1} (broken off)\n{''.join(kept)}\n")
        if self._open_line:
            sys.stdout.write("\n")
        sys.stdout.flush()


def text_of(chunk: Chunk) -> str:
    """Its text; with logprobs a line for each token: log-probability, text, and the alternatives with theirs."""
    if not chunk.logprobs:
        return chunk.text
    lines = []
    for text, one in zip(chunk.texts or (chunk.text,), chunk.logprobs, strict=False):
        others = "  ".join(f"{other.text!r} {other.logprob:.3f}" for other in one.alternatives)
        lines.append(f"{one.logprob:9.3f}  {text!r:16} {others}".rstrip() + "\n")
    return "".join(lines)
