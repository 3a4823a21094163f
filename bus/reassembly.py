"""Every position once and in order, out of chunks that come in any multiplicity, order and cut. No I/O.

A cell shows each position at least once: chunks repeat, overlap, begin before the position that a reader wants, and
may be missing. `Reassembly` drops what was seen, cuts what overlaps, keeps what came early, and says where the next
missing position is, so that whoever owns it can ask for it with `resume`.
"""

from __future__ import annotations

import msgspec

from bus.replies import Chunk

EARLY_LIMIT = 4096
"""Positions kept beyond a hole; what lies further out is dropped and shown again on `resume`."""


def cut(chunk: Chunk, start: int) -> Chunk | None:
    """The part of a chunk from position `start` on; None where it does not say which text that part has.

    >>> part = cut(Chunk("r", 3, (7, 8), "ab", ("a", "b")), 4)
    >>> part.position, part.tokens, part.text
    (4, (8,), 'b')
    """
    skip = start - chunk.position
    if skip <= 0:
        return chunk
    if skip >= len(chunk.tokens):
        return msgspec.structs.replace(chunk, position=start, tokens=(), text="", texts=(), logprobs=(), vectors=())
    if not chunk.texts and not chunk.vectors:
        return None
    texts = chunk.texts[skip:]
    return msgspec.structs.replace(
        chunk,
        position=start,
        tokens=chunk.tokens[skip:],
        text="".join(texts),
        texts=texts if len(texts) > 1 else (),
        logprobs=chunk.logprobs[skip:],
        vectors=chunk.vectors[skip:],
    )


class Reassembly:
    """The positions of one answer, from `start` on.

    `next` is the first position not yet given out; `ended` holds once the end was given out; `hole` says that
    something behind `next` is known while `next` itself is missing.
    """

    def __init__(self, start: int = 0) -> None:
        self.next = start
        self.ended = False
        self._early: dict[int, Chunk] = {}

    @property
    def hole(self) -> bool:
        return bool(self._early) and not self.ended

    def feed(self, chunk: Chunk) -> list[Chunk]:
        """What can be given out now: chunks that continue each other from `next` on, without repeats.

        The last one carries the end if the answer is complete; nothing follows it. A chunk without tokens and without
        an end says nothing.
        """
        if self.ended:
            return []
        if chunk.position > self.next:
            self._keep(chunk)
            return []
        ready: list[Chunk] = []
        self._take(chunk, ready)
        while self._early and ready and not self.ended:
            position = min(self._early)
            if position > self.next:
                break
            self._take(self._early.pop(position), ready)
        if self.ended:
            self._early.clear()
        return ready

    def _take(self, chunk: Chunk, ready: list[Chunk]) -> None:
        if chunk.next <= self.next and not chunk.end:
            return
        part = cut(chunk, self.next)
        if part is None:
            # Its text cannot be cut: the cell shows the rest again when asked from `next`.
            rest = msgspec.structs.replace(chunk, position=chunk.next, tokens=(), text="", logprobs=())
            self._early.setdefault(chunk.next, rest)
            return
        self.next = part.next
        self.ended = bool(part.end)
        ready.append(part)

    def _keep(self, chunk: Chunk) -> None:
        """Of two early chunks at one position the longer one stays, and an end is never forgotten for a shorter one."""
        known = self._early.get(chunk.position)
        if known is None or (chunk.next, bool(chunk.end)) > (known.next, bool(known.end)):
            self._early[chunk.position] = chunk
        if chunk.next - self.next > EARLY_LIMIT:
            farthest = max(self._early)
            if farthest - self.next > EARLY_LIMIT and len(self._early) > 1:
                del self._early[farthest]


class Choices:
    """The positions of every answer (choice) of one request, each from `start` on.

    The same questions as of `Reassembly`: `next` is the first position that some choice still misses. How many there
    are is known from `count` on, or from the first chunk with an end.
    """

    def __init__(self, start: int = 0, count: int = 1) -> None:
        self._start = start
        self._parts = [Reassembly(start) for _ in range(count)]

    @property
    def next(self) -> int:
        return min((part.next for part in self._parts if not part.ended), default=self._parts[0].next)

    @property
    def ended(self) -> bool:
        return all(part.ended for part in self._parts)

    @property
    def hole(self) -> bool:
        return any(part.hole for part in self._parts)

    def feed(self, chunk: Chunk) -> list[Chunk]:
        """What can be given out now of the chunk's choice; see `Reassembly.feed`."""
        while len(self._parts) < max(chunk.n, chunk.choice + 1):
            self._parts.append(Reassembly(self._start))
        return self._parts[chunk.choice].feed(chunk)
