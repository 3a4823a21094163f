"""What reviews found, on a whole control over the bus in memory, in virtual time. Each of these was broken once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from tiny_control import card

from actors.cell import Cell
from actors.control import Control
from actors.driver import DriverShell
from actors.readback import Difference
from actors.results import PAGE_SECONDS
from actors.store_driver import StoreDriver
from actors.stub_runtime import StubRuntime
from actors.stub_storage import StubStorage
from actors.unshown import SHOW_AGAIN_NS
from actors.watch import Watch
from actors.worker_driver import READERS_LIMIT, WorkerDriver
from bus.connection import Connection
from bus.contract import BusError, Delivery, Record, Unreachable, Usage
from bus.memory import MemoryBus, MemoryServer
from bus.memory_faults import NoFaults
from bus.messages import (
    CancelRequested,
    DifferenceAccepted,
    DriverLost,
    FactEnvelope,
    Generation,
    ReaderAttached,
    ReplyTo,
    RequestAccepted,
    WorkerStarted,
    decode_fact,
    decode_fact_body,
    encode,
    kind_of,
    request_id,
)
from bus.ordering import FactOrder, OpenEpoch
from bus.replies import Chunk, Status, decode_reply
from bus.service import Service
from bus.subjects import REPLY_LIMIT, FactSubject, Subjects, may_reply
from chaos.virtual_time import run as run_virtual

SUBJECTS = Subjects("main")
WORKER = "gpu/s1/0"
MINUTE = 60.0


class Late(NoFaults):
    """Records of TOKENS reach the readers of this connection late."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def deliver(self, log: str, record: Record) -> float:
        return self.seconds if log == "tokens" else 0.0


@dataclass
class Process:
    """A control that may be killed."""

    control: Control
    bus: MemoryBus
    task: asyncio.Task[None]


class World:
    """One cell with one server and one worker; controls come and go."""

    def __init__(self, step_seconds: float = 0.01) -> None:
        self.server = MemoryServer("main")
        self.client = self.server.bus("client")
        self.late = Late()
        self.runtime = StubRuntime(step_seconds=step_seconds)
        self.lives = 0
        self.tasks: list[asyncio.Task[None]] = []

    def control(self) -> Process:
        self.lives += 1
        bus = self.server.bus(f"control-{self.lives}", faults=self.late)
        control = Control(bus, "main", f"control-{self.lives}")
        return Process(control, bus, asyncio.get_running_loop().create_task(control.run()))

    async def kill(self, process: Process) -> None:
        self.server.kill(process.bus)
        process.task.cancel()
        await asyncio.gather(process.task, return_exceptions=True)

    def node(self) -> None:
        bus = self.server.bus("node")
        store = StoreDriver("s1", dram_bytes=10_000, storage=StubStorage((card("m"),)))
        worker = WorkerDriver(bus, SUBJECTS, "s1", 0, memory_bytes=100_000, max_slots=4, runtime=self.runtime)
        for driver in (store, worker):
            boots = boot_ids()
            shell = DriverShell(bus, SUBJECTS, driver, boot=lambda boots=boots: next(boots))  # type: ignore[misc]
            self.tasks.append(asyncio.get_running_loop().create_task(shell.run()))

    def facts(self, kind: type[Any]) -> list[Any]:
        found = []
        for record in self.server.ledger.since(1):
            subject = SUBJECTS.parse(record.subject)
            if isinstance(subject, FactSubject) and subject.kind == kind_of(kind):
                found.append(decode_fact_body(decode_fact(record.payload).body))
        return found

    async def state(self, actor: str, message: Any) -> None:
        payload = encode(FactEnvelope("test", msgspec.Raw(encode(message))))
        await self.client.ledger.append(SUBJECTS.fact(actor, kind_of(message)), payload)

    async def asked(self, body: dict[str, Any], inbox: str = "") -> tuple[Any, str]:
        """Publish a request; what listens on its reply subject, and that subject."""
        inbox = inbox or self.client.new_inbox()
        subscription = await self.client.subscribe(inbox)
        await self.client.publish(SUBJECTS.infer("m"), json.dumps(body).encode(), reply=inbox)
        return subscription, inbox


def boot_ids() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"boot-{number}"


@contextlib.asynccontextmanager
async def world(step_seconds: float = 0.01) -> AsyncIterator[World]:
    here = World(step_seconds)
    try:
        yield here
    finally:
        for task in here.tasks:
            task.cancel()
        await asyncio.gather(*here.tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def cell(step_seconds: float = 0.01) -> AsyncIterator[tuple[World, Process]]:
    """Up, with its model known."""
    async with world(step_seconds) as here:
        process = here.control()
        here.node()
        await asyncio.sleep(3)
        try:
            yield here, process
        finally:
            process.task.cancel()
            await asyncio.gather(process.task, return_exceptions=True)


async def heard(subscription: Any, seconds: float = 5.0) -> list[Any]:
    """What comes within some time; None for an empty message."""
    found: list[Any] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                delivery: Delivery = await subscription.next()
                found.append(decode_reply(delivery.payload, "json") if delivery.payload else None)
    return found


def ends(found: list[Any]) -> list[str]:
    return [one.end for one in found if isinstance(one, Chunk) and one.end]


# ---- reply subjects -----------------------------------------------------------------------------------------

CAPTURED = [
    SUBJECTS.said("a", "b", "c"),
    SUBJECTS.fact("cell", "rules.activated"),
    SUBJECTS.tokens(WORKER, 2),
    SUBJECTS.submit("m"),
    "longshore.other.said.a.b.c",
    "longshore",
    "$JS.API.STREAM.DELETE.LEDGER_main",
    "$SRV.PING",
    "a\u00a0b",
    "a\u2028b",
    "a\x01b",
    "a..b",
    "a.",
    ">",
    "a.*",
    "",
    "x" * (REPLY_LIMIT + 1),
]


def test_a_client_is_answered_only_where_it_could_write_itself() -> None:
    assert not any(may_reply(subject) for subject in CAPTURED)
    assert all(map(may_reply, ["_INBOX.a.1", "shop.order-7", "longshores.x", "ä.b", "x" * REPLY_LIMIT]))


def test_no_reply_subject_makes_the_cell_write_into_its_own_streams_or_end() -> None:
    async def main() -> None:
        async with cell() as (here, process):
            ledger, tokens = here.server.ledger.last_sequence, here.server.tokens.last_sequence
            for number, reply in enumerate(CAPTURED):
                for verb in ("infer.m", f"resume.{number:032x}", f"cancel.{number:032x}", "admin.status"):
                    await here.client.publish(f"longshore.main.{verb}", b'{"prompt":"x"}', reply=reply)
            service = Service(here.client, SUBJECTS, "me", ["infer"], dict)
            here.tasks.append(asyncio.create_task(service.answer("PING", "ping")))
            await asyncio.sleep(0)
            await here.client.publish("ping", b"", reply=CAPTURED[0])
            await asyncio.sleep(5)
            assert (here.server.ledger.last_sequence, here.server.tokens.last_sequence) == (ledger, tokens)
            assert not process.task.done() and not here.tasks[-1].done()
            subscription, _ = await here.asked({"prompt": "hello", "max_tokens": 3})
            assert ends(await heard(subscription)) == ["length"]

    run_virtual(main())


def test_one_message_that_nobody_thought_of_does_not_end_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with cell() as (here, process):

            def fails(*_: object, **__: object) -> None:
                raise ZeroDivisionError

            with monkeypatch.context() as patch:
                patch.setattr(process.control.intake, "parse", fails)
                subscription, _ = await here.asked({"prompt": "hello"})
                assert await heard(subscription) == []
            subscription, _ = await here.asked({"prompt": "hello", "max_tokens": 3})
            assert ends(await heard(subscription)) == ["length"]
            assert process.control.intake.counts["errors"] == 1

    run_virtual(main())


# ---- recovery -----------------------------------------------------------------------------------------------


def test_a_foreign_record_among_the_pages_does_not_end_the_control_that_seals() -> None:
    async def main() -> None:
        async with cell(0.1) as (here, process):
            subscription, _ = await here.asked({"prompt": "hello", "max_tokens": 30})
            await asyncio.sleep(1)
            epoch = process.control._cell().links[WORKER].epoch
            await here.client.tokens.append(SUBJECTS.tokens(WORKER, epoch), b'{"status":"accepted"}')
            found = await heard(subscription, 20)
            assert not process.task.done()
            assert ends(found) == ["length"]
            assert sorted({one.position for one in found if isinstance(one, Chunk)}) == list(range(30))

    run_virtual(main())


@pytest.mark.parametrize("pause", [1.0, MINUTE])
def test_an_end_that_came_about_while_no_control_was_up_is_shown(pause: float) -> None:
    """Nobody published what follows from the fact, so nobody has shown it, however long ago the fact was stated."""

    async def main() -> None:
        async with world() as here:
            first = here.control()
            await asyncio.sleep(1)
            await here.kill(first)
            inbox = here.client.new_inbox()
            subscription = await here.client.subscribe(inbox)
            asks = Generation(3, prompt="x")
            await here.state("requests", RequestAccepted("r" * 32, "c", "k", "gone", asks, ReplyTo(inbox)))
            await asyncio.sleep(pause)
            await here.state("requests", CancelRequested("nobody"))
            second = here.control()
            assert ends(await heard(subscription)) == ["failed"]
            await here.kill(second)
            await asyncio.sleep(MINUTE)
            await here.state("requests", CancelRequested("nobody"))
            assert SHOW_AGAIN_NS < MINUTE * 1e9
            third = here.control()
            assert await heard(subscription) == []  # shown long ago
            await here.kill(third)

    run_virtual(main())


def test_pages_that_come_late_are_not_said_to_be_gone() -> None:
    """While JetStream elects a leader, a reader waits; the answer stands, and its end is not another one."""

    async def main() -> None:
        async with cell() as (here, process):
            body = {"prompt": "hello", "max_tokens": 3, "client": "c", "key": "k"}
            subscription, _ = await here.asked(body)
            assert ends(await heard(subscription)) == ["length"]
            here.late.seconds = PAGE_SECONDS * 2
            asyncio.get_running_loop().call_later(7.0, setattr, here.late, "seconds", 0.0)
            slow = process.bus.tokens.read

            async def slowly(*arguments: Any, **options: Any) -> Any:
                reader = await slow(*arguments, **options)
                batch = reader.batch

                async def later(*a: Any) -> Any:
                    await asyncio.sleep(here.late.seconds)
                    return await batch(*a)

                reader.batch = later  # type: ignore[method-assign]
                return reader

            process.bus.tokens.read = slowly  # type: ignore[method-assign]
            subscription, _ = await here.asked(body)
            found = await heard(subscription, 40)
            assert ends(found) == ["length"]
            assert [one.error for one in found if isinstance(one, Chunk) and one.error] == []

    run_virtual(main())


# ---- repeated requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_reply", [True, False])
def test_a_repeated_request_is_shown_again_and_its_prompt_stands_once(same_reply: bool) -> None:
    async def main() -> None:
        async with cell() as (here, _):
            body = {"prompt": "hello", "max_tokens": 3, "client": "c", "key": "k"}
            first, inbox = await here.asked(body)
            assert ends(await heard(first)) == ["length"]
            await first.close()
            second, _ = await here.asked(body, inbox if same_reply else "")
            found = await heard(second)
            assert isinstance(found[0], Status) and found[0].status == "accepted"
            assert ends(found) == ["length"]
            assert len(here.facts(RequestAccepted)) == 1 and len(here.facts(ReaderAttached)) == 1

    run_virtual(main())


def test_another_body_under_the_same_key_and_reply_subject_is_refused() -> None:
    async def main() -> None:
        async with cell() as (here, _):
            body = {"prompt": "hello", "max_tokens": 3, "client": "c", "key": "k"}
            first, inbox = await here.asked(body)
            assert ends(await heard(first)) == ["length"]
            await first.close()
            second, _ = await here.asked(body | {"prompt": "else"}, inbox)
            codes = [one.error.code for one in await heard(second) if isinstance(one, Status) and one.error]
            assert codes == ["key_reused"]

    run_virtual(main())


# ---- watch --------------------------------------------------------------------------------------------------


async def watched(beats: Callable[[int], tuple[str, int]], seconds: float = 3.0) -> tuple[Watch, MemoryServer]:
    """A watch over one open epoch, 5, of one driver, while these heartbeats come."""
    server = MemoryServer("main")
    bus = server.bus("control")
    watch = Watch(bus, SUBJECTS, "me")
    order = FactOrder()
    order.state.drivers[WORKER] = OpenEpoch(5, "b", held={})
    listening = asyncio.create_task(watch.listen())
    other = server.bus("other")
    for number in range(int(seconds * 10)):
        driver, epoch = beats(number)
        await other.publish(SUBJECTS.heartbeat(driver), json.dumps({"driver": driver, "epoch": epoch}).encode())
        await asyncio.sleep(0.1)
        await watch.look(order, live=True)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    return watch, server


@pytest.mark.parametrize(("epoch", "lost"), [(5, 0), (4, 1), (6, 1)])
def test_only_heartbeats_of_the_open_epoch_count_as_life(epoch: int, lost: int) -> None:
    """A process of an epoch before, which goes on beating, must not hide that its successor is silent."""

    async def main() -> None:
        _, server = await watched(lambda number: (WORKER, epoch))
        assert bool(server.ledger.last_sequence) == bool(lost)

    run_virtual(main())


def test_names_that_nobody_opened_are_not_remembered() -> None:
    async def main() -> None:
        watch, _ = await watched(lambda number: (f"gpu/x/{number}", 1))
        assert list(watch._heard) == [WORKER]

    run_virtual(main())


def test_a_server_that_is_slow_to_say_how_full_it_is_hides_no_silence() -> None:
    async def main() -> None:
        async with world() as here:
            process = here.control()

            async def slow() -> Usage:
                await asyncio.sleep(0.7)
                return Usage(0, 0, 0, 1, here.server.ledger.last_sequence)

            await asyncio.sleep(1)
            process.bus.ledger.usage = slow  # type: ignore[method-assign]
            await asyncio.sleep(2)
            payload = encode(FactEnvelope(WORKER, msgspec.Raw(encode(WorkerStarted("s1", 0, 1000, 1))), boot="b"))
            await here.client.ledger.append(SUBJECTS.fact(WORKER, "worker.started"), payload)
            await asyncio.sleep(5)
            assert len(here.facts(DriverLost)) >= 1
            await here.kill(process)

    run_virtual(main())


# ---- what must not grow, and what must not be said ------------------------------------------------------------


def test_a_worker_holds_no_more_readers_of_a_sequence_than_the_cell() -> None:
    async def main() -> None:
        async with cell(0.2) as (here, _):
            body = {"prompt": "hello", "max_tokens": 60, "client": "c", "key": "k"}
            await here.asked(body)
            await asyncio.sleep(1)
            for _ in range(READERS_LIMIT + 40):
                await here.asked(body)
                await asyncio.sleep(0.01)
            await asyncio.sleep(1)
            shown: dict[str, None] = {}
            inner = here.server._route

            def route(delivery: Delivery, delay: float) -> int:
                if delivery.subject.startswith("_INBOX") and b'"position"' in delivery.payload:
                    shown[delivery.subject] = None
                return inner(delivery, delay)

            here.server._route = route  # type: ignore[method-assign]
            await asyncio.sleep(2)
            assert len(shown) == READERS_LIMIT

    run_virtual(main())


async def test_no_sentence_names_the_password_of_a_server() -> None:
    for url in ("nats://u:hidden@127.0.0.1:1", "u:hidden@127.0.0.1:1", "nats://u:hid@den@x:999999"):
        with pytest.raises(Unreachable) as caught:
            await Connection.open(url)
        assert "hid" not in str(caught.value) and "u:" not in str(caught.value)


async def test_what_cannot_be_sent_is_an_error_of_the_bus() -> None:
    with pytest.raises(BusError, match="not a subject"):
        Connection().frame("a\u00a0b", b"")


def test_a_heartbeat_that_is_nested_too_deeply_does_not_end_the_control() -> None:
    async def main() -> None:
        async with cell() as (here, process):
            await here.client.publish(SUBJECTS.heartbeat(WORKER), b'{"x":' + b"[" * 50_000)
            await asyncio.sleep(1)
            assert not process.task.done()

    run_virtual(main())


def test_what_is_no_derived_message_stops_a_control_until_an_operator_accepts_it() -> None:
    async def main() -> None:
        async with cell() as (here, process):
            for payload in (b"junk", b'{"fact":1,"index":0,"of":1,"body":' + b"[" * 50_000):
                await here.client.ledger.append(SUBJECTS.said("a", "b", "c"), payload)
                with pytest.raises(Difference) as caught:
                    await process.task
                found = caught.value
                await here.state("cell", DifferenceAccepted(found.fact, found.place))
                process.task = here.control().task
                await asyncio.sleep(2)
                assert not process.task.done()

    run_virtual(main())


def test_readers_that_come_back_cannot_fill_the_ledger() -> None:
    """What is left is for what must be said: a worker's facts, and what follows from them."""

    async def main() -> None:
        async with world() as here:
            here.server = MemoryServer("main", ledger_limit_bytes=1_000_000)
            here.client = here.server.bus("client")
            process = here.control()
            here.node()
            await asyncio.sleep(3)
            body = {"prompt": "hello", "max_tokens": 3, "client": "c", "key": "k"}
            subscription, _ = await here.asked(body)
            assert ends(await heard(subscription)) == ["length"]
            for number in range(3000):
                resume = SUBJECTS.resume(request_id("c", "k"))
                await here.client.publish(resume, b"", reply=f"{here.client.new_inbox()}.{number}")
                await asyncio.sleep(0.02)
            usage = await here.client.ledger.usage()
            assert usage.limit_bytes * 0.85 < usage.stored_bytes < usage.limit_bytes * 0.95
            again, _ = await here.asked(body)
            (refused,) = await heard(again)
            assert refused.error.code == "ledger_full"
            await here.kill(process)

    run_virtual(main())


def test_no_request_is_accepted_whose_tokens_find_no_room() -> None:
    async def main() -> None:
        async with world() as here:
            here.server = MemoryServer("main", tokens_limit_bytes=50_000, result_retention_seconds=100.0)
            here.client = here.server.bus("client")
            process = here.control()
            here.node()
            await asyncio.sleep(3)
            codes: list[str] = []
            for _ in range(20):
                subscription, _ = await here.asked({"prompt": "hello", "max_tokens": 50})
                found = await heard(subscription, 3)
                assert ends(found) == ["length"] or [one.status for one in found] == ["refused"]
                codes += [one.error.code for one in found if isinstance(one, Status) and one.error]
            assert codes and set(codes) == {"ledger_full"}
            await asyncio.sleep(100)
            subscription, _ = await here.asked({"prompt": "hello", "max_tokens": 5})
            assert ends(await heard(subscription)) == ["length"]
            await here.kill(process)

    run_virtual(main())


def test_how_deep_a_fact_may_be_nested_does_not_depend_on_who_reads_it() -> None:
    def said(depth: int, frames: int) -> list[str]:
        if frames:
            return said(depth, frames - 1)
        body = b'{"kind":"cancel.requested","request":"r","x":' + b"[" * depth + b"]" * depth + b"}"
        record = Record(1, 1, SUBJECTS.fact("requests", "cancel.requested"), b'{"sender":"o","body":' + body + b"}")
        return [one.subject for step in Cell("main").take(record) for one in step.said]

    for depth in range(0, 1000, 10):
        assert said(depth, 0) == said(depth, 100)
    brackets = RequestAccepted("r", "c", "k", "m", Generation(1, prompt='[{"\\' * 500))
    payload = encode(FactEnvelope("intake", msgspec.Raw(encode(brackets))))
    assert decode_fact_body(decode_fact(payload).body) == brackets
