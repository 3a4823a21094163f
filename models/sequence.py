"""One sequence inside an engine: its tokens, how far its cache reaches, and the text and end of its answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from bus.logprobs import Alternative, TokenLogprobs
from models.contract import NO_TOKEN, SequenceStart, TokenEvent
from models.detokenizer import Decode, Detokenizer
from models.likelihood import Likelihood
from models.shaping import Shaping, needs_shaping
from models.stops import StopFilter


class Sequence:
    """`tokens` is prompt and answer; `cached` of them are in the KV cache, at `slot`; `poisoned`
    when its numbers were not finite; `held` while it belongs to another engine; `shaping` is None where the request
    changes no logits. `logits` [1, vocabulary] stand behind the last token of a held sequence that is up to date.

    Text and end follow from the tokens alone: an answer that is continued elsewhere goes on with the same pieces.
    """

    __slots__ = (
        "_context",
        "_decode",
        "_detokenizer",
        "_eos",
        "_stops",
        "cached",
        "ended",
        "held",
        "logits",
        "poisoned",
        "shaping",
        "slot",
        "start",
        "tokens",
    )

    def __init__(self, start: SequenceStart, slot: int, decode: Decode, eos: frozenset[int], context: int) -> None:
        self.start = start
        self.slot = slot
        self.tokens = [*start.prompt, *start.generated]
        self.cached = 0
        self.poisoned = False
        self.held = start.held
        self.logits: torch.Tensor | None = None
        self.ended: str | None = None
        self._decode = decode
        self._eos = eos.union(start.sampling.stop_tokens) if start.sampling.stop_tokens else eos
        self.shaping = Shaping(start.sampling, start.prompt, self._eos) if needs_shaping(start.sampling) else None
        self._context = context
        self._detokenizer: Detokenizer | None = None
        self._stops = StopFilter(start.sampling.stop)

    @property
    def position(self) -> int:
        """Position of the next token of the answer."""
        return len(self.tokens) - len(self.start.prompt)

    @property
    def left(self) -> int:
        """Tokens that are not in the cache yet; 1 while it decodes."""
        return len(self.tokens) - self.cached

    def inherit(self, other: Sequence) -> None:
        """Take over the slot of another sequence, which has said nothing, with what its cache has of this one."""
        if other.poisoned:
            return
        if other.tokens == self.tokens and other.logits is not None:
            self.cached, self.logits = other.cached, other.logits
        else:
            self.cached = common_prefix(other.tokens, self.tokens, max(0, min(other.cached, len(self.tokens) - 1)))

    def extend(self, tokens: Iterable[int]) -> None:
        """Tokens of the answer that another engine made."""
        self.replay()
        self.logits = None
        for token in tokens:
            self.tokens.append(token)
            self.ended = self._text(token, self.position)[1] or self.ended

    def replay(self) -> None:
        """Bring text and end to where `generated` left them; the second call does nothing."""
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self._decode, self.start.prompt)
            for position, token in enumerate(self.start.generated):
                self.ended = self._text(token, position + 1)[1] or self.ended

    def take(self, token: int, likelihood: Likelihood | None = None) -> TokenEvent:
        """Append the next token of the answer; `ended` is set when it is the last."""
        position = self.position
        logprobs = self._logprobs(likelihood) if likelihood is not None else None
        self.tokens.append(token)
        text, self.ended = self._text(token, position + 1)
        return TokenEvent(self.start.key, position, token, text, self.ended, logprobs)

    def _logprobs(self, likelihood: Likelihood) -> TokenLogprobs:
        """With the text that each alternative would have added."""
        assert self._detokenizer is not None
        peek = self._detokenizer.peek
        likeliest = tuple(Alternative(token, logprob, peek(token)) for token, logprob in likelihood.likeliest)
        return TokenLogprobs(likelihood.chosen, likeliest)

    def already_over(self) -> TokenEvent:
        """The event of a sequence whose `generated` had ended."""
        return TokenEvent(self.start.key, self.position, NO_TOKEN, "", self.ended)

    def _text(self, token: int, answered: int) -> tuple[str, str | None]:
        """Text piece and end of a token of the answer, `answered` tokens of it included."""
        assert self._detokenizer is not None
        if self.shaping is not None:
            self.shaping.take(token)
        least = self.start.sampling.min_tokens
        if token in self._eos and answered > least:
            return self._rest(), "stop"
        text = self._stops.push(self._detokenizer.push(token), armed=answered >= least)
        if self._stops.stopped:
            return text, "stop"
        if answered >= self.start.sampling.max_tokens or len(self.start.prompt) + answered >= self._context:
            text += self._rest()
            return text, "stop" if self._stops.stopped else "length"
        return text, None

    def _rest(self) -> str:
        assert self._detokenizer is not None
        text = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush()


def answer_texts(start: SequenceStart, decode: Decode, eos: Iterable[int]) -> tuple[str, ...]:
    """The pieces of text of the tokens in `start.generated`, as they were when these were decoded."""
    unlimited = len(start.prompt) + len(start.generated) + 1
    sequence = Sequence(replace(start, generated=()), 0, decode, frozenset(eos), unlimited)
    sequence.replay()
    return tuple(sequence.take(token).text for token in start.generated)


def common_prefix(one: list[int], other: list[int], most: int) -> int:
    """How many of their first `most` tokens are the same."""
    if one[:most] == other[:most]:
        return most
    return next(index for index in range(most) if one[index] != other[index])
