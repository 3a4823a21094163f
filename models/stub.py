"""An engine without a model: deterministic tokens at no cost, for tests and benches of everything around an engine.

Token at a position = hash of (prompt, seed, position); its text is "tok<token> ". Same contract as the real engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from models.contract import NO_TOKEN, AdmissionRefused, Engine, SequenceStart, TokenEvent, check_start
from models.stops import StopFilter


@dataclass(slots=True)
class _Stubbed:
    start: SequenceStart
    digest: bytes
    stops: StopFilter
    position: int
    prefill_left: int
    ended: str | None


class StubEngine:
    """Obeys `models.contract.Engine`; `step_seconds` is called once in every step that has something to do.

    A prompt token of id t has the text "tok<t> " too. `eos`, if given, ends an answer as it would in a model.
    """

    def __init__(
        self,
        *,
        slots: int = 16,
        context: int = 4096,
        vocabulary: int = 1000,
        prefill_chunk: int = 256,
        eos: frozenset[int] = frozenset(),
        step_seconds: Callable[[], None] | None = None,
    ) -> None:
        self.slots = slots
        self.context = context
        self._vocabulary = vocabulary
        self._prefill_chunk = prefill_chunk
        self._eos = eos
        self._wait = step_seconds
        self._sequences: dict[str, _Stubbed] = {}

    def admit(self, start: SequenceStart) -> None:
        """Reserve a slot; raises AdmissionRefused."""
        if start.key in self._sequences:
            raise AdmissionRefused(f"Sequence {start.key!r} is here already.")
        if len(self._sequences) >= self.slots:
            raise AdmissionRefused(f"All {self.slots} KV slots are taken: wait until a sequence ends.")
        check_start(start, context=self.context, vocabulary=self._vocabulary)
        facts = repr((start.prompt, start.sampling.seed & (2**64 - 1)))
        sequence = _Stubbed(
            start=start,
            digest=hashlib.blake2b(facts.encode(), digest_size=16).digest(),
            stops=StopFilter(start.sampling.stop),
            position=0,
            prefill_left=len(start.prompt) + len(start.generated),
            ended=None,
        )
        for token in start.generated:
            sequence.ended = self._take(sequence, token)[1] or sequence.ended
        self._sequences[start.key] = sequence

    def cancel(self, key: str) -> bool:
        """Free the slot of this sequence; False if it is not here."""
        return self._sequences.pop(key, None) is not None

    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._sequences)

    def step(self) -> list[TokenEvent]:
        """One prefill chunk shared by those that wait, one token for each of those that decode."""
        if not self._sequences:
            return []
        if self._wait is not None:
            self._wait()
        budget = self._prefill_chunk
        events: list[TokenEvent] = []
        for key, sequence in list(self._sequences.items()):
            if sequence.ended is not None:
                events.append(TokenEvent(key, sequence.position, NO_TOKEN, "", sequence.ended))
            else:
                fed = min(sequence.prefill_left, budget)
                sequence.prefill_left -= fed
                budget -= fed
                if sequence.prefill_left:
                    continue
                position = sequence.position
                token = self._token(sequence)
                text, end = self._take(sequence, token)
                events.append(TokenEvent(key, position, token, text, end))
            if events[-1].end is not None:
                del self._sequences[key]
        return events

    def _token(self, sequence: _Stubbed) -> int:
        facts = sequence.digest + sequence.position.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little") % self._vocabulary

    def _take(self, sequence: _Stubbed, token: int) -> tuple[str, str | None]:
        """Text and end of the token at the sequence's position."""
        sequence.position += 1
        stopped = token in self._eos
        text = "" if stopped else sequence.stops.push(f"tok{token} ")
        if stopped or sequence.stops.stopped:
            return text + sequence.stops.flush(), "stop"
        full = len(sequence.start.prompt) + sequence.position >= self.context
        if full or sequence.position >= sequence.start.sampling.max_tokens:
            return text + sequence.stops.flush(), "length"
        return text, None


_KEEPS_THE_CONTRACT: type[Engine] = StubEngine  # for the type checker
