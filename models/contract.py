"""What an engine promises, without a line of how: the driver, the benches and the stub all meet here.

An engine holds a fixed number of sequences, each in a slot of its KV cache. `admit` reserves a slot and computes
nothing; every `step` computes at most one prefill chunk and one token for each decoding sequence. Sequences join and
leave between any two steps, and what one sequence says does not depend on which others are there.

An engine belongs to one thread: none of its methods may run at the same time as another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bus.logprobs import ALTERNATIVES_LIMIT, TokenLogprobs

NO_TOKEN = -1
"""Token id of an event that carries an end and no token."""


class AdmissionRefused(Exception):
    """The engine will not take this sequence; the message is one sentence, and the engine is as it was before."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen and when the answer ends.

    `max_tokens` counts tokens of the answer, an end-of-sequence token included. `temperature` 0 takes the most likely
    token; `top_k` 0 and `top_p` 1 leave every token in. `seed` may be any integer: its low 64 bits count. `stop` holds
    strings that end the answer as soon as one of them is complete in its text; it is not shown. `stop_tokens` end it
    beside the model's own end-of-sequence tokens. None of these do before there are `min_tokens` tokens: an end of
    sequence is never chosen among the first `min_tokens`, and a stop string that is complete before counts as text.

    Logits change in this order, all of it following from prompt and tokens so far alone: those of tokens that stand in
    the prompt or the answer are divided by `repetition_penalty` where positive, multiplied where negative; tokens of
    the answer lose `presence_penalty` once and `frequency_penalty` for each time; `logit_bias` is added.

    `logprobs`: so many of the likeliest tokens come with each token, and its own log-probability; -1 for none of that.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens so far, beyond what the model makes of them."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence as it enters an engine, from its beginning or from where another engine left it.

    `generated` are the tokens of the answer that are durable already: they are computed again and not emitted again,
    and the next event has position `len(generated)`.

    With `held` it belongs to another engine still: its cache is computed, tokens that are made there come by `extend`,
    and nothing is emitted before `release`.

    With `inputs` it is an embedding, and has no prompt: position i is the vector of input i, and `generated` has the
    number of tokens of each input whose vector is durable.
    """

    key: str
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    sampling: Sampling
    inputs: tuple[tuple[int, ...], ...] = ()
    held: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens that somebody sent."""
        return sum(map(len, self.inputs)) if self.inputs else len(self.prompt)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one answer.

    `position` counts from 0 within the answer. `text` is what became certain with this token: it may be empty (half a
    character, the beginning of a stop string), and joined over all positions it is the answer's text; it follows from
    prompt and tokens alone. `end` is None, "stop" (end-of-sequence token or stop string) or "length" (`max_tokens` or
    the context is full); after an event with an end the sequence has left the engine.

    When the `generated` of a start had ended already, the only event is one without a token: `token` is NO_TOKEN,
    `position` is `len(generated)`, `text` is empty and `end` is set. `logprobs` is there where they were asked for and
    there is a token.
    """

    key: str
    position: int
    token: int
    text: str
    end: str | None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class VectorEvent:
    """The next vectors of one embedding, from `position` on: float32, little endian. `counts` has the number of tokens
    of each input. With `done` these were the last ones, and the sequence has left the engine.
    """

    key: str
    position: int
    counts: tuple[int, ...]
    vectors: tuple[bytes, ...]
    done: bool


Event = TokenEvent | VectorEvent


class Engine(Protocol):
    """See the head of this file."""

    @property
    def slots(self) -> int:
        """Sequences it can hold at once."""

    @property
    def context(self) -> int:
        """Tokens that one sequence can hold, prompt and answer together."""

    def admit(self, start: SequenceStart) -> None:
        """Reserve a slot; raises AdmissionRefused. Cheap: computes nothing."""

    def cancel(self, key: str) -> bool:
        """Free the slot of this sequence now, without an event; False if it is not here."""

    def active(self) -> int:
        """Sequences that hold a slot."""

    def busy(self) -> bool:
        """Whether a step has something to compute: sequences that are held and up to date want none."""

    def extend(self, key: str, tokens: Sequence[int]) -> None:
        """The next tokens of the answer of a held sequence, made elsewhere."""

    def left(self, key: str) -> int:
        """Tokens of a held sequence whose cache is still to be computed before it may go on without a prefill."""

    def release(self, key: str) -> None:
        """A held sequence goes on here: its next token comes with a following step."""

    def step(self) -> Sequence[Event]:
        """Compute once: at most one prefill chunk and one token per decoding sequence; [] when there is nothing to do.

        While nothing decodes, a few chunks may go into one step: no sequence waits for its next token then.

        A sequence whose prefill is finished by this step emits its first token in it. No sequence has two events.
        """


def check_start(start: SequenceStart, *, context: int, vocabulary: int) -> None:
    """Raise AdmissionRefused, in one sentence, for what no engine of this context and vocabulary can take."""
    sampling = start.sampling
    if not start.prompt:
        raise AdmissionRefused("The prompt is empty: send at least one token.")
    if len(start.prompt) >= context:
        raise AdmissionRefused(
            f"The prompt has {len(start.prompt)} tokens and the context holds {context}, answer included: "
            "shorten the prompt."
        )
    if len(start.prompt) + len(start.generated) > context:
        raise AdmissionRefused(
            f"Prompt and answer so far have {len(start.prompt) + len(start.generated)} tokens and the context holds "
            f"{context}: continue on an engine with a longer context."
        )
    for token in (*start.prompt, *start.generated):
        if not 0 <= token < vocabulary:
            raise AdmissionRefused(f"Token id {token} is outside the vocabulary of {vocabulary}.")
    if sampling.max_tokens < 1:
        raise AdmissionRefused(f"max_tokens is {sampling.max_tokens}: ask for at least 1.")
    if not 0.0 <= sampling.temperature < float("inf"):
        raise AdmissionRefused(f"temperature is {sampling.temperature}: use 0 (greedy) or a positive number.")
    if not 0.0 < sampling.top_p <= 1.0:
        raise AdmissionRefused(f"top_p is {sampling.top_p}: use a number above 0 and up to 1.")
    if sampling.top_k < 0:
        raise AdmissionRefused(f"top_k is {sampling.top_k}: use 0 (all tokens) or a positive number.")
    if sampling.min_tokens < 0:
        raise AdmissionRefused(f"min_tokens is {sampling.min_tokens}: use 0 or a positive number.")
    if not -1 <= sampling.logprobs <= ALTERNATIVES_LIMIT:
        raise AdmissionRefused(f"logprobs is {sampling.logprobs}: ask for at most {ALTERNATIVES_LIMIT}.")
    if not 0.0 < sampling.repetition_penalty < float("inf"):
        raise AdmissionRefused(f"repetition_penalty is {sampling.repetition_penalty}: use a positive number.")
    for name in ("presence_penalty", "frequency_penalty"):
        if not float("-inf") < getattr(sampling, name) < float("inf"):
            raise AdmissionRefused(f"{name} is {getattr(sampling, name)}: use a number.")
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise AdmissionRefused(f"logit_bias has token id {token}, outside the vocabulary of {vocabulary}.")
        if not float("-inf") < bias < float("inf"):
            raise AdmissionRefused(f"logit_bias of token id {token} is {bias}: use a number.")
    for token in sampling.stop_tokens:
        if not 0 <= token < vocabulary:
            raise AdmissionRefused(f"stop_tokens has token id {token}, outside the vocabulary of {vocabulary}.")
    if any(not stop for stop in sampling.stop):
        raise AdmissionRefused("A stop string is empty: remove it.")


def check_inputs(start: SequenceStart, *, context: int, vocabulary: int) -> None:
    """Raise AdmissionRefused, in one sentence, for an embedding that no engine of this context can take."""
    for number, tokens in enumerate(start.inputs):
        if not tokens:
            raise AdmissionRefused(f"Input {number} has no tokens: send at least one in each.")
        if len(tokens) > context:
            raise AdmissionRefused(
                f"Input {number} has {len(tokens)} tokens and the context holds {context}: shorten it."
            )
        if wrong := next((token for token in tokens if not 0 <= token < vocabulary), None):
            raise AdmissionRefused(f"Token id {wrong} of input {number} is outside the vocabulary of {vocabulary}.")
    if len(start.generated) > len(start.inputs):
        raise AdmissionRefused(f"{len(start.generated)} vectors are said to be durable, of {len(start.inputs)} inputs.")
