"""An engine without a model: deterministic tokens at no cost, for tests and benches of everything around an engine.

Token at a position = hash of (prompt, seed, position); its text is "tok<token> ". Same contract as the real engine,
with penalties as strict as can be: a sequence that asks for any passes over the tokens it has said (or, by a repetition
penalty, that its prompt has), one with a bias over those that it makes less likely.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from bus.logprobs import Alternative, TokenLogprobs
from models.contract import (
    NO_TOKEN,
    AdmissionRefused,
    Engine,
    Event,
    SequenceStart,
    TokenEvent,
    VectorEvent,
    check_inputs,
    check_start,
)
from models.stops import StopFilter


@dataclass(slots=True)
class _Stubbed:
    start: SequenceStart
    digest: bytes
    stops: StopFilter
    position: int
    prefill_left: int
    ended: str | None
    passed: set[int]
    eos: frozenset[int]
    held: bool


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
        if start.inputs:
            check_inputs(start, context=self.context, vocabulary=self._vocabulary)
        else:
            check_start(start, context=self.context, vocabulary=self._vocabulary)
        facts = repr((start.prompt, start.sampling.seed & (2**64 - 1)))
        sampling = start.sampling
        passed = {token for token, bias in sampling.logit_bias if bias < 0}
        if sampling.repetition_penalty != 1.0:
            passed.update(start.prompt)
        sequence = _Stubbed(
            start=start,
            digest=hashlib.blake2b(facts.encode(), digest_size=16).digest(),
            stops=StopFilter(start.sampling.stop),
            position=0,
            prefill_left=len(start.prompt) + len(start.generated),
            ended=None,
            passed=passed,
            eos=self._eos.union(sampling.stop_tokens),
            held=start.held,
        )
        if start.inputs:
            sequence.position = len(start.generated)
        for token in () if start.inputs else start.generated:
            sequence.ended = self._take(sequence, token)[1] or sequence.ended
        self._sequences[start.key] = sequence

    def cancel(self, key: str) -> bool:
        """Free the slot of this sequence; False if it is not here."""
        return self._sequences.pop(key, None) is not None

    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._sequences)

    def busy(self) -> bool:
        """Whether a step has something to do."""
        return any(not sequence.held or sequence.prefill_left for sequence in self._sequences.values())

    def extend(self, key: str, tokens: Iterable[int]) -> None:
        """The next tokens of a held sequence."""
        sequence = self._sequences[key]
        for token in tokens:
            sequence.prefill_left += 1
            sequence.ended = self._take(sequence, token)[1] or sequence.ended

    def left(self, key: str) -> int:
        """Tokens of a held sequence that are still to be computed."""
        return self._sequences[key].prefill_left

    def release(self, key: str) -> None:
        """A held sequence goes on here."""
        self._sequences[key].held = False

    def step(self) -> list[Event]:
        """One prefill chunk shared by those that wait, one token for each of those that decode."""
        if not self.busy():
            return []
        if self._wait is not None:
            self._wait()
        budget = self._prefill_chunk
        events: list[Event] = []
        for key, sequence in list(self._sequences.items()):
            if sequence.start.inputs:
                events.append(vectors := self._embed(sequence))
                if vectors.done:
                    del self._sequences[key]
                continue
            if sequence.ended is not None and not sequence.held:
                event = TokenEvent(key, sequence.position, NO_TOKEN, "", sequence.ended)
            else:
                fed = min(sequence.prefill_left, budget)
                sequence.prefill_left -= fed
                budget -= fed
                if sequence.prefill_left or sequence.held:
                    continue
                position = sequence.position
                token = self._token(sequence)
                logprobs = self._logprobs(sequence, token)
                text, end = self._take(sequence, token)
                event = TokenEvent(key, position, token, text, end, logprobs)
            events.append(event)
            if event.end is not None:
                del self._sequences[key]
        return events

    def _embed(self, sequence: _Stubbed) -> VectorEvent:
        """Vectors of the next inputs, up to a chunk of tokens: hashes of input and seed, as four numbers below 1."""
        start, first, fed = sequence.start, sequence.position, 0
        vectors = []
        for tokens in start.inputs[first:]:
            if fed and fed + len(tokens) > self._prefill_chunk:
                break
            fed += len(tokens)
            facts = repr((tokens, start.sampling.seed & (2**64 - 1))).encode()
            digest = hashlib.blake2b(facts, digest_size=4).digest()
            vectors.append(struct.pack("<4f", *(byte / 256 for byte in digest)))
        sequence.position += len(vectors)
        counts = tuple(len(tokens) for tokens in start.inputs[first : sequence.position])
        return VectorEvent(start.key, first, counts, tuple(vectors), sequence.position == len(start.inputs))

    def _token(self, sequence: _Stubbed) -> int:
        facts = sequence.digest + sequence.position.to_bytes(8, "little")
        token = int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little") % self._vocabulary
        early = sequence.position < sequence.start.sampling.min_tokens
        for _ in range(self._vocabulary):
            if token not in sequence.passed and not (early and token in sequence.eos):
                break
            token = (token + 1) % self._vocabulary
        return token

    def _logprobs(self, sequence: _Stubbed, token: int) -> TokenLogprobs | None:
        """The chosen token is the likeliest; the next ids follow."""
        wanted = sequence.start.sampling.logprobs
        if wanted < 0:
            return None
        first = -((token * 31 + sequence.position) % 997 + 1) / 1000
        ids = [(token + place) % self._vocabulary for place in range(min(wanted, self._vocabulary))]
        alternatives = [Alternative(one, first - place, f"tok{one} ") for place, one in enumerate(ids)]
        return TokenLogprobs(first, tuple(alternatives))

    def _take(self, sequence: _Stubbed, token: int) -> tuple[str, str | None]:
        """Text and end of the token at the sequence's position."""
        sequence.position += 1
        sampling = sequence.start.sampling
        if sampling.penalises:
            sequence.passed.add(token)
        stopped = token in sequence.eos and sequence.position > sampling.min_tokens
        armed = sequence.position >= sampling.min_tokens
        text = "" if stopped else sequence.stops.push(f"tok{token} ", armed=armed)
        if stopped or sequence.stops.stopped:
            return text + sequence.stops.flush(), "stop"
        full = len(sequence.start.prompt) + sequence.position >= self.context
        if full or sequence.position >= sampling.max_tokens:
            return text + sequence.stops.flush(), "length"
        return text, None


def stub_texts(start: SequenceStart, eos: frozenset[int]) -> tuple[str, ...]:
    """The pieces of text of the tokens in `start.generated`, as they were when these were decoded."""
    longest = len(start.prompt) + len(start.generated) + 1
    engine = StubEngine(slots=1, context=longest, vocabulary=2**31, eos=eos)
    sampling = replace(start.sampling, max_tokens=longest)
    engine.admit(replace(start, generated=(), sampling=sampling))
    sequence = engine._sequences[start.key]
    return tuple(engine._take(sequence, token)[0] for token in start.generated)


_KEEPS_THE_CONTRACT: type[Engine] = StubEngine  # for the type checker
