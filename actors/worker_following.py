"""Following sequences that run on another worker: their pages are read as they come, their cache is computed meanwhile.

    follow ─▶ gather (prompt, earlier tokens) ─▶ read the source's pages ─▶ admit, held ─▶ rounds ─▶ caught up
                                                        │                                              │
                                                        └── go on until the attempt ends there ──▶ resume: decode

Rules
* Nothing of a followed sequence is decoded, made durable or shown here before `sequence.resume`.
* A round ends when what was known at its beginning is computed. Rounds shrink; the last is followed by `caught-up`,
  and so is the ROUNDS_LIMITth, however far the source has got meanwhile.
* Engines are touched between steps only (`feed`); reading goes on in tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from actors.driver import Epoch
from actors.worker_preparing import Preparing
from actors.worker_prompts import NotKept
from actors.worker_runtime import AttachRefused, PromptRefused, WorkerRuntime
from actors.worker_sequences import HeldSequence, ReplyReader, Stop, tokens_digest
from bus.contract import BusError, Log
from bus.logprobs import TokenLogprobs
from bus.messages import (
    AddReader,
    CaughtUp,
    DropSequence,
    FollowSequence,
    Message,
    ResumeSequence,
    RoundFinished,
    SequenceDropped,
    SequenceRefused,
    StartSequence,
)
from bus.pages import Page, PageSequence, decode_page
from bus.subjects import Subjects
from bus.tasks import Tasks
from models.contract import AdmissionRefused, Engine, SequenceStart

GAP_TOKENS = 4
"""Tokens that are recomputed in about the time of one decode step. Prefill is about ten times as fast per token as
decoding (PAPER, contribution 2), but a round from 16 to 4 costs the source nothing, and the reader waits for the last.
"""
ROUNDS_LIMIT = 8
RETRY_SECONDS = 0.1

logger = logging.getLogger("longshore.driver")


@dataclass(slots=True)
class FollowedSequence:
    """`tokens`, `texts` and `logprobs` begin at position 0. `fed`: tokens of the answer that the engine knows."""

    effect: FollowSequence
    number: int
    start: SequenceStart | None = None
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    current: bool = False
    admitted: bool = False
    answered: bool = False
    fed: int = 0
    rounds: int = 0
    first: int = 0
    goal: int = 0
    began: float = 0.0
    resume: tuple[int, ResumeSequence] | None = None
    stopping: Stop = ""

    @property
    def key(self) -> str:
        return f"{self.effect.request}/{self.effect.attempt}"

    def take(self, part: PageSequence) -> None:
        """The next positions, from a page of the source; what is known already is passed over."""
        known = len(self.tokens) - part.position
        if 0 <= known < len(part.tokens):
            self.tokens += part.tokens[known:]
            self.texts += part.texts[known:]
            self.logprobs += part.logprobs[known:]

    def held(self, now: float) -> HeldSequence:
        """As a sequence of this worker, from the effect that resumes it."""
        assert self.start is not None and self.resume is not None
        number, message = self.resume
        effect = self.effect
        start = StartSequence(
            request=effect.request,
            attempt=effect.attempt,
            model=effect.model,
            accepted=effect.accepted,
            position=message.position,
            history=message.history,
            replies=message.replies,
            choice=effect.choice,
        )
        sequence = HeldSequence(start, number, now, [ReplyReader(reply, reply.start) for reply in message.replies])
        sequence.start, sequence.running = self.start, True
        sequence.tokens, sequence.texts, sequence.logprobs = self.tokens, self.texts, self.logprobs
        sequence.durable = len(self.tokens)
        sequence.stopping = self.stopping
        sequence.digest = tokens_digest(self.tokens)
        return sequence


class Followers:
    """All sequences that one epoch of a worker follows. `wanted` is called when `feed` has something to do.

    `catch_up` false: the source is let go as soon as a slot is taken here (stop and recompute).
    """

    def __init__(
        self,
        epoch: Epoch,
        tokens: Log,
        subjects: Subjects,
        preparing: Preparing,
        runtime: WorkerRuntime,
        engines: dict[str, Engine],
        tasks: Tasks,
        wanted: Callable[[], None],
        *,
        catch_up: bool = True,
    ) -> None:
        self._catch_up = catch_up
        self._epoch, self._tokens, self._subjects = epoch, tokens, subjects
        self._preparing, self._runtime, self._engines = preparing, runtime, engines
        self._tasks, self._wanted = tasks, wanted
        self._now = asyncio.get_running_loop().time
        self._followed: dict[str, FollowedSequence] = {}
        self._leaving: list[tuple[Engine, str]] = []

    # ---- effects ----------------------------------------------------------------------------------------------

    def follow(self, number: int, message: FollowSequence) -> None:
        followed = FollowedSequence(message, number)
        if followed.key in self._followed:
            self._state(self._refused(followed, "it is followed here already"), number)
            return
        self._followed[followed.key] = followed
        logger.info("follows", extra=self._fields(followed) | {"source": message.source})
        self._tasks.spawn(self._read(followed), "follows")

    def resume(self, number: int, message: ResumeSequence) -> None:
        followed = self._followed.get(f"{message.request}/{message.attempt}")
        if followed is None:
            reason = "it is not followed here any more"
            self._state(SequenceRefused(message.request, message.attempt, reason, retry=True), number)
            return
        followed.resume = number, message
        self._wanted()

    def cancel(self, key: str, reason: Stop) -> bool:
        """Whether it is to go on here and has not yet: then it ends as soon as it does."""
        followed = self._followed.get(key)
        if followed is None or followed.resume is None:
            return False
        followed.stopping = reason
        return True

    def add_reader(self, message: AddReader, limit: int) -> bool:
        """Whether it is to go on here and has not yet: then the reader is shown it as soon as it does."""
        followed = self._followed.get(f"{message.request}/{message.attempt}")
        if followed is None or followed.resume is None:
            return False
        number, resume = followed.resume
        others = [known for known in resume.replies if known.subject != message.reply.subject]
        followed.resume = number, msgspec.structs.replace(resume, replies=(*others, message.reply)[-limit:])
        return True

    def drop(self, number: int, message: DropSequence) -> None:
        followed = self._followed.get(f"{message.request}/{message.attempt}")
        if followed is not None:
            self._forget(followed, "it is to be forgotten")
        self._state(SequenceDropped(message.request, message.attempt), number)

    @property
    def any(self) -> bool:
        """Whether anything is followed here."""
        return bool(self._followed)

    def fail(self, model: str, reason: str) -> None:
        """The engine of this model is gone, or broke: what it held of others is refused."""
        for followed in [one for one in self._followed.values() if one.effect.model == model]:
            self._forget(followed, reason)

    def leaving(self) -> list[tuple[Engine, str]]:
        """Slots that are to be freed before the next step."""
        leaving, self._leaving = self._leaving, []
        return leaving

    # ---- reading ----------------------------------------------------------------------------------------------

    async def _read(self, followed: FollowedSequence) -> None:
        """Gather what the sequence starts from, then its pages as they come, until its attempt ends there."""
        effect = followed.effect
        start = StartSequence(
            request=effect.request,
            attempt=effect.attempt,
            model=effect.model,
            accepted=effect.accepted,
            position=effect.position,
            history=effect.history,
            generation=effect.generation,
            choice=effect.choice,
        )
        try:
            prepared = await self._preparing.gather(start)
            if prepared.start.inputs:
                raise NotKept("embeddings are not moved: they take one step")
        except (AttachRefused, PromptRefused, NotKept) as refused:
            self._forget(followed, str(refused))
            return
        followed.tokens, followed.texts = list(prepared.earlier.tokens), list(prepared.texts)
        followed.logprobs = list(prepared.earlier.logprobs)
        followed.start = prepared.start
        while followed.key in self._followed:
            try:
                if await self._pages(followed):
                    return
            except BusError as error:
                logger.warning("following waits", extra=self._fields(followed) | {"reason": str(error)})
                await asyncio.sleep(RETRY_SECONDS)

    async def _pages(self, followed: FollowedSequence) -> bool:
        """Read the source's subject; True when there is nothing more to come."""
        effect = followed.effect
        subject = self._subjects.tokens(effect.source, effect.epoch)
        last = await self._tokens.last(subject)
        end = last.sequence if last is not None else 0
        self._catch(followed, effect.after, end)
        reader = await self._tokens.read([subject], start=effect.after + 1)
        try:
            while followed.key in self._followed:
                for record in await reader.batch():
                    if self._take(followed, record.payload):
                        self._catch(followed, end, end)
                        return True
                    self._catch(followed, record.sequence, end)
        finally:
            await reader.close()
        return True

    def _take(self, followed: FollowedSequence, payload: bytes) -> bool:
        """One record of the source; True when the attempt ends with it."""
        try:
            page = decode_page(payload)
        except ValueError:
            return True
        if not isinstance(page, Page):
            return True
        for part in page.sequences:
            if (part.request, part.attempt) == (followed.effect.request, followed.effect.source_attempt):
                followed.take(part)
                return bool(part.end)
        return False

    def _catch(self, followed: FollowedSequence, at: int, end: int) -> None:
        """What stood there when reading began is read: the first round may begin."""
        followed.current = followed.current or at >= end
        if followed.current:
            self._wanted()

    # ---- between steps ------------------------------------------------------------------------------------------

    async def feed(self) -> list[HeldSequence]:
        """Tell the engines what is new; those that are resumed with this call."""
        if leaving := self.leaving():
            await self._runtime.cancel(leaving)
        resumed = []
        for followed in list(self._followed.values()):
            engine = self._engines.get(followed.effect.model)
            if engine is None:
                self._forget(followed, f"{followed.effect.model} is not attached here any more")
                continue
            if followed.current and not followed.admitted:
                self._admit(followed, engine)
            if not followed.admitted:
                continue
            if followed.fed < len(followed.tokens):
                engine.extend(followed.key, followed.tokens[followed.fed :])
                followed.fed = len(followed.tokens)
            self._count(followed, engine)
            if followed.resume is not None and len(followed.tokens) >= followed.resume[1].position:
                sequence = self._resumed(followed, engine)
                if sequence is not None:
                    resumed.append(sequence)
        return resumed

    def _admit(self, followed: FollowedSequence, engine: Engine) -> None:
        assert followed.start is not None
        if engine.active() >= engine.slots:
            return  # somebody is just leaving: a slot was kept for it
        start = replace(followed.start, generated=tuple(followed.tokens), held=True)
        try:
            engine.admit(start)
        except AdmissionRefused as refused:
            self._forget(followed, str(refused))
            return
        followed.admitted = True
        followed.fed = followed.goal = len(followed.tokens)
        followed.rounds, followed.began = 1, self._now()

    def _count(self, followed: FollowedSequence, engine: Engine) -> None:
        """Whether a round has ended, and whether it was the last."""
        computed = followed.fed - engine.left(followed.key)
        effect = followed.effect
        if not self._catch_up and not followed.answered:
            followed.answered = True
            self._state(CaughtUp(effect.request, effect.attempt, 1, 0), followed.number)
        if followed.answered or computed < followed.goal:
            return
        left = len(followed.tokens) - followed.goal
        duration_ns = int((self._now() - followed.began) * 1e9)
        finished = RoundFinished(
            request=effect.request,
            attempt=effect.attempt,
            round=followed.rounds,
            first=followed.first,
            next=followed.goal,
            left=left,
            duration_ns=duration_ns,
        )
        self._state(finished, 0)
        if left <= GAP_TOKENS or followed.rounds >= ROUNDS_LIMIT:
            followed.answered = True
            caught_up = CaughtUp(effect.request, effect.attempt, followed.rounds, followed.goal)
            self._state(caught_up, followed.number)
            return
        followed.rounds += 1
        followed.first, followed.goal, followed.began = followed.goal, followed.fed, self._now()

    def _resumed(self, followed: FollowedSequence, engine: Engine) -> HeldSequence | None:
        assert followed.resume is not None
        number, message = followed.resume
        if len(followed.tokens) > message.position:
            # What was read is durable, so the cell's position cannot lie before it, unless somebody meddled.
            self._state(SequenceRefused(message.request, message.attempt, "it went on elsewhere", retry=True), number)
            followed.resume = None
            self._forget(followed, "it went on elsewhere")
            return None
        if not followed.answered:
            followed.answered = True
            caught_up = CaughtUp(message.request, message.attempt, max(1, followed.rounds), len(followed.tokens))
            self._state(caught_up, followed.number)
        engine.release(followed.key)
        del self._followed[followed.key]
        logger.info("resumes", extra=self._fields(followed) | {"position": message.position})
        return followed.held(self._now())

    # ---- what they have in common -------------------------------------------------------------------------------

    def _forget(self, followed: FollowedSequence, reason: str) -> None:
        """Its effects are answered, its slot is free before the next step."""
        if self._followed.pop(followed.key, None) is None:
            return
        if followed.admitted and followed.effect.model in self._engines:
            self._leaving.append((self._engines[followed.effect.model], followed.key))
            self._wanted()
        if not followed.answered:
            self._state(self._refused(followed, reason), followed.number)
        if followed.resume is not None:
            self._state(self._refused(followed, reason), followed.resume[0])

    @staticmethod
    def _refused(followed: FollowedSequence, reason: str) -> Message:
        return SequenceRefused(followed.effect.request, followed.effect.attempt, reason[:4000], retry=True)

    def _state(self, message: Message, number: int) -> None:
        self._epoch.state(message, answers=number)

    def _fields(self, followed: FollowedSequence) -> dict[str, object]:
        effect = followed.effect
        return {
            "request": effect.request,
            "attempt": effect.attempt,
            "model": effect.model,
            "epoch": self._epoch.number,
        }
