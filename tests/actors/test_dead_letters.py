"""Quarantined requests on real processes: what the ledger tells of them, and how they are tried again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from live_cell import live_cell

from actors.dead_cli import body_of
from bus.api import encode_reply, parse_infer
from bus.client import RequestFailed

EVERY_FIELD = {
    "messages": [{"role": "user", "content": "one"}], "max_tokens": 9, "seed": 3, "temperature": 0.5, "top_p": 0.9,
    "top_k": 4, "stop": ["x"], "stop_tokens": [5], "min_tokens": 1, "repetition_penalty": 1.5,
    "presence_penalty": 1.0, "frequency_penalty": -1.0, "logit_bias": {"7": 2.0}, "logprobs": 2, "n": 2,
    "priority": 4, "client": "somebody", "deadline_ms": 50_000,
}  # fmt: skip


@pytest.mark.parametrize("fields", [EVERY_FIELD, {"prompt": "p"}, {"tokens": [1, 2]}])
def test_a_body_is_made_again_from_its_fact(fields: dict[str, Any]) -> None:
    first = parse_infer(encode_reply(fields | {"key": "a"}, "json"), None, "m").accepted
    again = parse_infer(encode_reply(body_of(first) | {"key": "a"}, "json"), None, "m").accepted
    assert again == first


async def test_a_request_whose_workers_die_twice_is_kept_with_its_history(tmp_path: Path) -> None:
    async with live_cell(tmp_path, nodes=1, step_seconds=0.02) as cell:
        answer = cell.client.infer("stub", prompt="poison", max_tokens=100, key="poison")
        waited = iter((3, 8))
        victim, until = cell.nodes[0], next(waited)
        with pytest.raises(RequestFailed, match="2 workers died"):
            async for chunk in answer:
                if until is not None and chunk.position >= until:
                    victim.signal(signal.SIGKILL)
                    until = next(waited, None)
                    if until is not None:
                        cell.nodes.pop()
                        victim = await cell.add_node("n0", step_seconds=0.02)
        (letter,) = await cell.told("dead", "list")
        assert letter["key"] == "poison" and len(letter["deaths"]) == 2
        told = await cell.told("dead", "show", letter["request"][:8])
        first, second = told["deaths"]
        assert first["worker"] == second["worker"] == "gpu/n0/0" and 0 < first["epoch"] < second["epoch"]
        assert 3 <= first["position"] <= second["position"]
        kinds = [event["kind"] for event in told["events"]]
        assert kinds.count("driver.lost") + kinds.count("tokens.seal") >= 2 and kinds[-1] == "request.quarantined"
        cell.nodes.pop()
        await cell.add_node("n0")
        again = (await cell.told("dead", "retry", letter["request"]))["request"]
        assert again != letter["request"]
        result = await cell.client.result(again, wait=20)
        assert result.status == "ended" and len(result.tokens) == 100
