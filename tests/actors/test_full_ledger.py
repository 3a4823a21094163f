"""At 100 % of the ledger's limit: nothing is lost, nothing half done, and all goes on once there is room."""

from __future__ import annotations

import asyncio
import json

import msgspec
from test_review import SUBJECTS, ends, heard, world

from actors.replay import verify
from bus.contract import LogFull
from bus.memory import MemoryServer
from bus.messages import CancelRequested, FactEnvelope, encode, request_id
from chaos.virtual_time import run as run_virtual


def test_a_full_ledger_loses_nothing_and_goes_on_once_there_is_room() -> None:
    """To the last byte: what was accepted is computed, stays unsaid, and is said when somebody makes room."""

    async def main() -> None:
        async with world(step_seconds=0.2) as here:
            here.server = MemoryServer("main", ledger_limit_bytes=40_000)
            here.client = here.server.bus("client")
            process, other = here.control(), here.control()
            here.node()
            await asyncio.sleep(3)
            body = {"prompt": "hello", "max_tokens": 30, "client": "c", "key": "k"}
            subscription, _ = await here.asked(body)
            await asyncio.sleep(1)
            # Somebody fills what is left, with facts that say nothing.
            size = 2000
            while size > 1:
                filler = encode(FactEnvelope("t", msgspec.Raw(encode(CancelRequested("0" * 32)))))
                try:
                    await here.client.ledger.append(SUBJECTS.fact("requests", "cancel.requested"), filler + b" " * size)
                except LogFull:
                    size //= 2
            await asyncio.sleep(20)
            stored = here.server.ledger.usage()
            assert stored.limit_bytes - stored.stored_bytes < 200
            for verb in (SUBJECTS.cancel, SUBJECTS.resume):
                told = await here.client.request(verb(request_id("c", "k")), b"", timeout=5.0)
                assert json.loads(told.payload)["error"]["code"] == "ledger_full"
            status = json.loads((await here.client.request(SUBJECTS.admin("status"), b"")).payload)
            assert status["streams"]["ledger"]["percent"] >= 99
            result = json.loads((await here.client.request(SUBJECTS.result(request_id("c", "k")), b"")).payload)
            assert result["status"] == "running", "its end is shown, and could not be stated"
            assert not process.task.done() and not other.task.done()
            here.server.ledger.limit_bytes = 1_000_000
            await asyncio.sleep(5)
            result = json.loads((await here.client.request(SUBJECTS.result(request_id("c", "k")), b"")).payload)
            assert (result["status"], result["positions"], result["end"]) == ("ended", 30, "length")
            assert ends(await heard(subscription)) == ["length"]
            records = here.server.ledger.since(1)
            verdict = verify("main", records)
            assert verdict.difference is None and not verdict.pending
            await here.kill(process)
            await here.kill(other)

    run_virtual(main())
