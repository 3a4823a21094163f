"""Simulated applications: each asks a few times through the client library, and does what applications do.

They come in bursts, repeat a key, cancel, set deadlines, go away in mid-answer and come back for the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from bus.answer import Answer, Patience, RequestFailed
from bus.client import PARTS_FROM_BYTES, Client, RequestFields
from bus.contract import Bus
from bus.messages.requests import Encoding, choice_id, request_id
from chaos.machines import REFUSED_PROMPT, seeded
from chaos.observer import Observer
from chaos.options import Options
from chaos.promises import Promise

FOR_EVER = Patience(silence=2.0, nobody=1e6, total=1e6)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one application does with one request. Positions of -1 mean never; `at` in virtual seconds.

    With `inputs` it wants so many vectors; with `parts` its prompt goes ahead of the request.
    """

    number: int
    at: float
    client: str
    key: str
    model: str
    prompt: str
    max_tokens: int
    seed: int
    encoding: Encoding
    deadline_ms: int
    cancel_at: int
    leave_at: int
    away: float
    twin: bool
    n: int
    fields: RequestFields
    inputs: int = 0
    parts: bool = False

    @property
    def request(self) -> str:
        return request_id(self.client, self.key)

    @property
    def texts(self) -> list[str]:
        """What an application that wants `inputs` vectors wants them of: texts of differing lengths."""
        return [self.prompt[: 9 + number % 20] + f" {number}" for number in range(self.inputs)]

    @property
    def members(self) -> list[str]:
        """The ids that its answers have inside the cell."""
        return [choice_id(self.request, self.client, self.key, index) for index in range(self.n)]


def draw_fields(random: Random) -> RequestFields:
    """What else a request asks for; in half of them nothing."""
    fields: RequestFields = {}
    if random.random() < 0.5:
        return fields
    if random.random() < 0.3:
        fields["logprobs"] = random.choice((0, 2))
    if random.random() < 0.3:
        fields["min_tokens"] = 1
        fields["stop_tokens"] = random.sample(range(1000), 20)
    if random.random() < 0.2:
        fields["stop"] = [f"tok{random.randint(10, 99)}", "2 tok7"]
    if random.random() < 0.3:
        fields["presence_penalty"] = 0.5
        fields["repetition_penalty"] = random.choice((1.0, 1.2))
    if random.random() < 0.2:
        fields["logit_bias"] = dict.fromkeys(random.sample(range(1000), 50), -100)
    if random.random() < 0.2:
        fields["priority"] = random.randint(-3, 3)
    return fields


def draw_plans(random: Random, options: Options) -> list[Plan]:
    """All requests of a world, in bursts over its time of faults."""
    latest = options.fault_seconds * (0.3 if options.longest_prompt else 0.8)
    bursts = sorted(random.uniform(0.3, latest) for _ in range(random.randint(1, 4)))
    plans = []
    for number in range(options.requests):
        # From a generator of its own, so that worlds of before stay the same but for this.
        more = seeded("fields", options.seed, number)
        prompt = f"request {number} " + "x" * random.randint(0, 15)
        if options.longest_prompt:
            prompt += "y" * int((options.longest_prompt - 40) * seeded("prompts", options.seed, number).random() ** 2)
        plans.append(
            Plan(
                number=number,
                at=random.choice(bursts) + 0.2 * random.random(),
                client=f"client-{number % 3}",
                key=f"key-{number}",
                model=random.choice(options.models).model,
                prompt=REFUSED_PROMPT + prompt if random.random() < 0.03 else prompt,
                max_tokens=random.choice(
                    options.answers or ((40, 80, 120, 200) if options.long_answers else (1, 5, 20, 40))
                ),
                seed=random.getrandbits(31),
                encoding=random.choice(("json", "msgpack")),
                deadline_ms=random.randint(1, 4000) if random.random() < 0.1 else 0,
                cancel_at=random.randint(0, 10) if random.random() < 0.1 else -1,
                leave_at=random.randint(0, 10) if random.random() < 0.15 else -1,
                away=3.0 * random.random(),
                twin=random.random() < 0.1,
                n=more.randint(2, 5) if more.random() < options.several else 1,
                fields=draw_fields(more),
            )
        )
    # Drawn last: what a seed's other applications do does not depend on it.
    return [_other_kind(random, plan) for plan in plans]


def _other_kind(random: Random, plan: Plan) -> Plan:
    """Some want vectors instead of an answer, some send their prompt in parts."""
    chance, inputs = random.random(), random.choice((1, 12, 60, 256))
    if chance < 0.2:
        return replace(plan, inputs=inputs, n=1)
    return replace(plan, parts=chance < 0.35)


class Application:
    """Carries out one plan. `end` is how its answer ended, empty until then; `done` when it has looked back.

    `read` and `ends`: of each of its answers, the position behind the last one read, and how it ended.
    """

    def __init__(self, plan: Plan, bus: Bus, cell: str, observer: Observer, note: Callable[[str], None]) -> None:
        self.plan = plan
        self.end = ""
        self.error = ""
        self.read = [0] * plan.n
        self.ends = [""] * plan.n
        self.done = False
        parts_from = 8 if plan.parts else PARTS_FROM_BYTES
        self._client = Client(
            bus, cell, name=plan.client, encoding=plan.encoding, patience=FOR_EVER, parts_from_bytes=parts_from
        )
        self._observer = observer
        self._note = note
        self._left = False
        self._cancelling: asyncio.Future[None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it has asked the cell to cancel."""
        return self._cancelling is not None

    @property
    def position(self) -> int:
        """The first position from which on one of its answers was not read."""
        return min(self.read)

    async def run(self) -> None:
        plan = self.plan
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, plan.at - loop.time()))
        while not self.end:
            answer = self._ask()
            try:
                async for chunk in answer:
                    expected = self.read[chunk.choice]
                    self.read[chunk.choice] = self._observer.read(f"reader of {plan.key}", expected, chunk)
                    self.ends[chunk.choice] = chunk.end
                    if self._cancels(answer):
                        self._cancelling = asyncio.ensure_future(self._cancel())
                    if self._leaves():
                        await answer.aclose()
                        await asyncio.sleep(plan.away)
                        break
                self.end = answer.end
            except RequestFailed as failure:
                self.end = answer.end
                self.error = f"{failure.code}: {failure}"
                if not self.end:
                    self._note(f"{plan.key} is told {self.error}")
                    await asyncio.sleep(max(0.3, failure.retry_ms / 1000))
        await self._look_back()
        self.done = True

    def _ask(self) -> Answer:
        plan, start = self.plan, self.position
        self.read, self.ends = [start] * plan.n, [""] * plan.n
        if self._left:
            return self._client.resume(plan.request, start)
        if plan.inputs:
            return self._client.embedding(
                plan.model, plan.texts, key=plan.key, start=start, deadline_ms=plan.deadline_ms or None
            )
        fields: RequestFields = {
            **plan.fields,
            "max_tokens": plan.max_tokens,
            "seed": plan.seed,
            "deadline_ms": plan.deadline_ms or None,
            "n": plan.n if plan.n > 1 else None,
        }
        return self._client.infer(plan.model, plan.prompt, key=plan.key, start=start, **fields)

    def _cancels(self, answer: Answer) -> bool:
        due = 0 <= self.plan.cancel_at <= self.position and not answer.end
        return due and self._cancelling is None

    def _leaves(self) -> bool:
        if self._left or not 0 <= self.plan.leave_at <= self.position:
            return False
        self._left = True
        return True

    async def _cancel(self) -> None:
        try:
            await self._client.cancel(self.plan.request)
        except RequestFailed as failure:
            self._note(f"cancel of {self.plan.key} is told {failure.code}: {failure}")

    async def _look_back(self) -> None:
        """The whole answer, asked for after its end, has the positions that were read."""
        while True:
            try:
                result = await self._client.result(self.plan.request)
            except RequestFailed as failure:
                self._note(f"result of {self.plan.key} is told {failure.code}: {failure}")
                await asyncio.sleep(0.5)
                continue
            if result.status == "ended":
                break
            await asyncio.sleep(0.5)
        told = [(chunk.end, chunk.next) for chunk in result.choices] or [(result.end, result.positions)]
        seen = list(zip(self.ends, self.read, strict=True))
        if told != seen or (result.end, result.positions) != (self.end, sum(self.read)):
            what = f"{self.plan.key} read {seen} and {self.end!r}"
            told_all = f"its result has {told}, {result.positions} and {result.end!r}"
            self._observer.violation(Promise.ENDED_ONCE, f"{what}, {told_all}")
