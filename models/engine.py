"""One engine on plain transformers: continuous batching over a slot cache.

Schedule, run, absorb: `step` decodes one token for every row that is ready, then feeds one chunk of prompt to rows
that are not. Slots 0 .. decoding-1 hold the rows that decode, without a hole, so that a forward pass reads a slice of
the cache; rows in prefill and free slots lie behind them. A row that leaves is replaced by the last row that decodes;
a row that has finished its prefill goes to the first slot behind them, where the oldest one normally is already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from models.architecture import Architecture
from models.contract import AdmissionRefused, Sampling, SequenceStart, TokenEvent, check_start
from models.detokenizer import Decode
from models.errors import ModelError
from models.likelihood import Likelihood, measure
from models.masks import Masks, masks
from models.sampling import choose
from models.sequence import Sequence, common_prefix
from models.shaping import shape
from models.slot_cache import SlotCache, bytes_per_token

DEFAULT_PREFILL_CHUNK = 256
DEFAULT_IDLE_CHUNKS = 4
FORESEEN = "foreseen"
"""The key of a prompt that nobody asked yet; those of sequences have a slash."""
SHARED_AT_LEAST = 32
"""Tokens of a common beginning that are worth a copy of the cache."""


class SlotEngine:
    """Obeys `models.contract.Engine` over a causal language model of transformers.

    `kv_bytes` bounds the KV cache: slots = min(max_slots, kv_bytes // (context * bytes per token)); ModelError if not
    one fits. `decode` turns a list of tokens into text. `prefill_chunk` bounds the prompt tokens of a step, padding
    included, while a sequence decodes; `idle_chunks` times as many while none does. Numbers that are not finite do not
    spread: a slot that may hold them is zeroed when its row leaves.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        decode: Decode,
        *,
        eos: Iterable[int],
        kv_bytes: int,
        context: int,
        max_slots: int = 16,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        idle_chunks: int = DEFAULT_IDLE_CHUNKS,
    ) -> None:
        per_slot = context * bytes_per_token(architecture.layers, model.dtype)
        if kv_bytes < per_slot:
            raise ModelError(
                f"The KV budget of {kv_bytes:,} bytes does not hold one sequence of {context:,} tokens "
                f"({per_slot:,} bytes): raise the budget or lower the context."
            )
        if max_slots < 1 or prefill_chunk < 1:
            raise ModelError(f"max_slots is {max_slots} and prefill_chunk {prefill_chunk}: both must be at least 1.")
        self.slots = min(max_slots, kv_bytes // per_slot)
        self.context = context
        self._model = model
        self._device: torch.device = model.device
        self._kinds = architecture.kinds
        self._sees_all = [(kind.window, kind.chunk) for kind in architecture.kinds] == [(None, None)]
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._decode_text = decode
        self._eos = frozenset(eos)
        self._prefill_chunk = prefill_chunk
        self._idle_chunks = idle_chunks
        self._cache = SlotCache(architecture.layers, self.slots, context, model.dtype, self._device)
        self._rows: list[Sequence | None] = [None] * self.slots
        self._decoding = 0
        self._by_key: dict[str, Sequence] = {}  # in order of admission

    def admit(self, start: SequenceStart) -> None:
        """Reserve a slot; raises AdmissionRefused. Computes nothing."""
        if start.key in self._by_key:
            raise AdmissionRefused(f"Sequence {start.key!r} is here already.")
        if self.active() >= self.slots:
            raise AdmissionRefused(f"All {self.slots} KV slots are taken: wait until a sequence ends.")
        check_start(start, context=self.context, vocabulary=self._vocabulary)
        foreseen = self._by_key.get(FORESEEN)
        if foreseen is not None:
            self._leave(foreseen)
        slot = foreseen.slot if foreseen is not None else self._rows.index(None, self._decoding)
        sequence = Sequence(start, slot, self._decode_text, self._eos, self.context)
        if foreseen is not None:
            sequence.inherit(foreseen)
        self._rows[slot] = self._by_key[start.key] = sequence

    def foresee(self, prompt: tuple[int, ...]) -> None:
        """Steps compute the cache of this prompt, which will probably be asked. The first sequence that is admitted,
        be it another one, gets its slot, with what is computed of its own beginning. Only in an engine that has no
        sequence; raises AdmissionRefused.
        """
        assert not self._by_key, "what is foreseen yields to every sequence"
        self.admit(SequenceStart(FORESEEN, prompt, (), Sampling(max_tokens=1), held=True))

    def cancel(self, key: str) -> bool:
        """Free the slot of this sequence now; False if it is not here."""
        sequence = self._by_key.get(key)
        if sequence is None:
            return False
        self._leave(sequence)
        return True

    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._by_key) - (FORESEEN in self._by_key)

    def busy(self) -> bool:
        """Whether a step has something to compute."""
        return bool(self._decoding) or any(row.left or not row.held for row in self._by_key.values())

    def extend(self, key: str, tokens: Iterable[int]) -> None:
        """The next tokens of a held sequence."""
        self._by_key[key].extend(tokens)

    def left(self, key: str) -> int:
        """Tokens of a held sequence that are still to be computed."""
        return self._by_key[key].left

    def release(self, key: str) -> None:
        """A held sequence goes on here; one that is up to date with the next step, without a forward pass for it."""
        self._by_key[key].held = False

    def step(self) -> list[TokenEvent]:
        """At most one prefill chunk and one token for every sequence that decodes."""
        if not self._by_key:
            return []
        with torch.inference_mode():
            events = self._decode()
            return events + self._prefill()

    # -- schedule -----------------------------------------------------------------------------------------------------

    def _decode(self) -> list[TokenEvent]:
        if not self._decoding:
            return []
        rows = self._present(0, self._decoding)
        return self._run(rows, [1] * len(rows))

    def _prefill(self) -> list[TokenEvent]:
        waiting = [sequence for sequence in self._by_key.values() if sequence.slot >= self._decoding]
        events: list[TokenEvent] = []
        for sequence in waiting:
            sequence.replay()
            if sequence.held and not sequence.left:
                continue
            if sequence.ended is not None and not sequence.held:
                events.append(sequence.already_over())
                self._leave(sequence)
                continue
            if sequence.logits is not None:
                logits, sequence.logits = sequence.logits, None
                events += self._answer([sequence], logits)
                continue
            self._share_prefix(sequence)
            rows, tokens = self._chunk(sequence)
            return events + self._run(rows, [min(row.left, tokens) for row in rows])
        return events

    def _share_prefix(self, sequence: Sequence) -> None:
        """What another slot has computed of the same beginning is copied: answers of one prompt, or several that move
        here together, pay for it once.
        """
        if sequence.cached:
            return
        best, source = SHARED_AT_LEAST - 1, None
        most = sequence.left - 1
        for row in self._by_key.values():
            if row is not sequence and not row.poisoned and row.cached > best:
                same = common_prefix(row.tokens, sequence.tokens, min(row.cached, most))
                if same > best:
                    best, source = same, row.slot
        if source is not None:
            self._cache.move(source, sequence.slot, best)
            sequence.cached = best

    def _chunk(self, oldest: Sequence) -> tuple[list[Sequence], int]:
        """Rows of the next prefill chunk and the most tokens that one of them gets.

        The oldest goes as far as the budget lets it. Rows in the slots right behind it come along when that does not
        slow it down: a burst of short prompts costs one forward pass and not one each. One that begins like another
        waits until that beginning is computed, and takes it from there. While nobody decodes, nobody's step is
        lengthened: then the budget is `idle_chunks` chunks.
        """
        budget = self._prefill_chunk if self._decoding else self._prefill_chunk * self._idle_chunks
        best, best_tokens, best_fed = [oldest], min(oldest.left, budget), 0
        rows: list[Sequence] = []
        for row in self._present(oldest.slot, self.slots):
            row.replay()
            if row.ended is not None or not row.left or any(self._will_share(row, other) for other in rows):
                break
            if row is not oldest:
                self._share_prefix(row)
            rows.append(row)
            tokens = min(max(row.left for row in rows), budget // len(rows))
            if tokens < min(oldest.left, budget):
                break
            fed = sum(min(row.left, tokens) for row in rows)
            if fed > best_fed:
                best, best_tokens, best_fed = list(rows), tokens, fed
        return best, best_tokens

    @staticmethod
    def _will_share(row: Sequence, other: Sequence) -> bool:
        """Whether nothing of a row is computed, and more of another one's tokens than are computed yet begin it."""
        most = min(len(row.tokens) - 1, len(other.tokens))
        if row.cached or most < max(SHARED_AT_LEAST, other.cached + 1):
            return False
        return common_prefix(row.tokens, other.tokens, most) >= max(SHARED_AT_LEAST, other.cached + 1)

    def _present(self, first: int, end: int) -> list[Sequence]:
        """The rows from slot `first` up to the first free slot or `end`."""
        rows: list[Sequence] = []
        for row in self._rows[first:end]:
            if row is None:
                break
            rows.append(row)
        return rows

    # -- run ----------------------------------------------------------------------------------------------------------

    def _run(self, rows: list[Sequence], counts: list[int]) -> list[TokenEvent]:
        """Feed `counts` tokens to rows in neighbouring slots; an event for each that has no token left to feed."""
        logits = self._forward(rows, counts)
        broken = torch.isnan(logits[:, 0]).tolist()
        for row, count, poisoned in zip(rows, counts, broken, strict=True):
            row.cached += count
            row.poisoned |= poisoned
        ready = []
        for index, row in enumerate(rows):
            if row.left == 0 and row.held:
                row.logits = logits[index : index + 1].clone()
            elif row.left == 0:
                ready.append(index)
        if not ready:
            return []
        return self._answer([rows[index] for index in ready], logits if len(ready) == len(rows) else logits[ready])

    def _answer(self, answering: list[Sequence], last: torch.Tensor) -> list[TokenEvent]:
        """The next token of rows, from the logits [rows, vocabulary] behind their last ones."""
        places = [row.position for row in answering]
        if any(row.shaping is not None for row in answering):
            last = shape(last, [row.shaping for row in answering], places)
        tokens = choose(last, [row.start.sampling for row in answering], places)
        wanted = [row.start.sampling.logprobs for row in answering]
        found = measure(last, tokens, wanted) if max(wanted) >= 0 else [None] * len(wanted)
        return [self._absorb(*each) for each in zip(answering, tokens, found, strict=True)]

    def _forward(self, rows: list[Sequence], counts: list[int]) -> torch.Tensor:
        """Logits [rows, vocabulary] behind each row's last token; shorter rows are padded and write nothing for it."""
        starts = [row.cached for row in rows]
        width = max(counts)
        fed, places = [], []
        for row, start, count in zip(rows, starts, counts, strict=True):
            fed.append(row.tokens[start : start + count] + [0] * (width - count))
            # Padding repeats the last position: a learned position embedding has none behind its end.
            places.append([*range(start, start + count), *[start + count - 1] * (width - count)])
        span = self._cache.at(rows[0].slot, starts, counts)
        positions = torch.tensor(places, device=self._device)
        padded = min(counts) < width
        output = self._model(
            input_ids=torch.tensor(fed, device=self._device),
            position_ids=positions,
            attention_mask=self._masks(positions, starts, span.length),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor([[count - 1] for count in counts], device=self._device) if padded else 1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _masks(self, positions: torch.Tensor, starts: list[int], length: int) -> Masks | None:
        """None where one token per row sees all of its row and all rows are equally long: attention is cheaper then."""
        if self._sees_all and positions.shape[1] == 1 and min(starts) == max(starts):
            return None
        return masks(positions, length, self._kinds, self._model.dtype)

    # -- absorb -------------------------------------------------------------------------------------------------------

    def _absorb(self, row: Sequence, token: int, likelihood: Likelihood | None) -> TokenEvent:
        event = row.take(token, likelihood)
        if event.end is not None:
            self._leave(row)
        elif row.slot >= self._decoding:
            self._join(row)
        return event

    def _join(self, row: Sequence) -> None:
        """The row has finished its prefill: make it the last of those that decode."""
        target = self._decoding
        self._decoding += 1
        if row.slot == target:
            return
        other = self._rows[target]
        source = row.slot
        self._rows[source] = None
        if other is None or other.cached == 0:
            self._move(row, target)
        else:
            self._cache.swap(source, target, max(row.cached, other.cached))
            self._rows[target], row.slot = row, target
        if other is not None:
            self._rows[source], other.slot = other, source

    def _leave(self, row: Sequence) -> None:
        """Free the slot of a row; the last row that decodes fills the hole."""
        del self._by_key[row.start.key]
        self._rows[row.slot] = None
        if row.poisoned:
            self._cache.wipe(row.slot)
        if row.slot < self._decoding:
            self._decoding -= 1
            last = self._rows[self._decoding]
            if last is not None:
                self._rows[last.slot] = None
                self._move(last, row.slot)

    def _move(self, row: Sequence, target: int) -> None:
        source = row.slot
        self._cache.move(source, target, row.cached)
        if row.poisoned:
            self._cache.wipe(source)
        self._rows[target], row.slot = row, target
