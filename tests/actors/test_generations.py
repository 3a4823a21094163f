"""The ledger's beginning becomes a verified recording before it goes; after an interruption it may be done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cell_snapshots import FACTS, LEDGER, SUBJECTS, a_control, a_server, running, state_at, store

from actors import generations
from actors.bench_replay import CELL
from actors.cell_snapshots import find_start
from actors.generations import GenerationBroken, RotationRefused, rotate
from actors.readback import Difference
from actors.replaying import replay_live, replay_recording
from bus.memory import MemoryBus
from bus.recording import Recording, write_recording

EARLY, LATER, THIRD, LAST = (FACTS[at] for at in (200, 300, 450, 600))


async def make(bus: MemoryBus, folder: Path, **how: Any) -> generations.Generation:
    return await rotate(bus, CELL, folder, say=lambda text: None, **how)


async def two(bus: MemoryBus) -> None:
    await store(bus, EARLY)
    await store(bus, LATER)


async def test_one_generation_after_the_other(tmp_path: Path) -> None:
    server, bus = a_server()
    server.ledger.load(LEDGER[: LATER.sequence + 50])
    await two(bus)
    made = await make(bus, tmp_path)
    assert (made.first, made.cut, made.last, made.dropped) == (1, EARLY.sequence, LATER.sequence, EARLY.sequence - 1)
    assert server.ledger.first_sequence == EARLY.sequence and not made.held_back_by
    verdict, _ = replay_recording(Path(made.recording), verify=True, at=0)
    assert verdict is not None and verdict.difference is None and verdict.snapshot == 0
    # The cell goes on, and so does the next generation, from the state at the cut.
    server.ledger.load(LEDGER[EARLY.sequence - 1 :])
    await store(bus, THIRD)
    await store(bus, LAST)
    again = await make(bus, tmp_path)
    assert (again.first, again.cut, again.last) == (EARLY.sequence, THIRD.sequence, LAST.sequence)
    recording = Recording.open(again.recording)
    assert recording.header.snapshot == EARLY.sequence
    verdict, found = replay_recording(recording.path, verify=True, at=THIRD.sequence)
    assert verdict is not None and verdict.difference is None and verdict.snapshot == EARLY.sequence
    assert found is not None and found.digest() == state_at(THIRD.sequence).digest()
    assert [path.name for path in tmp_path.glob("*.lssnap")] == [f"{CELL}-{THIRD.sequence:012d}.lssnap"]
    # A control, a replay and a recording of what is left begin with a snapshot.
    assert (await find_start(bus, SUBJECTS)).cell.position == LAST.sequence
    async with running(a_control(server, "a")) as control:
        assert control.replica is not None and control.replica.cell.digest() == state_at(FACTS[-1].sequence).digest()
    verdict, _ = await replay_live(bus, CELL, verify=True, at=0)
    assert verdict is not None and verdict.difference is None and verdict.snapshot == THIRD.sequence
    await write_recording(tmp_path / "rest", bus, cell=CELL)
    verdict, _ = replay_recording(tmp_path / "rest", verify=True, at=0)
    assert verdict is not None and verdict.difference is None and verdict.verified > 500


@pytest.mark.parametrize("step", ["_record", "_verify", "_keep", "drop", "_forget"])
async def test_a_crash_after_any_step_is_made_good_by_doing_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    server, bus = a_server()
    await two(bus)
    where: Any = type(bus.ledger) if step == "drop" else generations
    real = getattr(where, step)

    class Crash(Exception):
        pass

    def crash(*arguments: Any) -> Any:
        done = real(*arguments)
        if step not in ("_record", "drop"):
            raise Crash

        async def later() -> None:
            await done
            raise Crash

        return later()

    monkeypatch.setattr(where, step, crash)
    with pytest.raises(Crash):
        await make(bus, tmp_path)
    monkeypatch.undo()
    over = step in ("drop", "_forget")
    assert server.ledger.first_sequence == (EARLY.sequence if over else 1)
    if over:
        with pytest.raises(RotationRefused):
            await make(bus, tmp_path)
    else:
        made = await make(bus, tmp_path)
        assert made.dropped == EARLY.sequence - 1
    (recording,) = tmp_path.glob("*.lsrec")
    verdict, _ = replay_recording(recording, verify=True, at=0)
    assert verdict is not None and verdict.difference is None
    assert (await find_start(bus, SUBJECTS)).cell.position == LATER.sequence


async def test_what_is_not_as_the_code_computes_it_is_not_dropped(tmp_path: Path) -> None:
    server, bus = a_server()
    await two(bus)
    said = next(r for r in LEDGER[50:] if ".said." in r.subject)
    server.ledger.alter(said.sequence, said.payload.replace(b'"of":', b'"of":1'))
    with pytest.raises(Difference):
        await make(bus, tmp_path)
    server.ledger.load([r for r in LEDGER if r is not said])
    with pytest.raises(RotationRefused):  # no snapshot belongs to a ledger with a hole
        await make(bus, tmp_path)
    server.ledger.load(LEDGER)
    wrong = state_at(FACTS[349].sequence)
    wrong.position = FACTS[350].sequence
    await store(bus, FACTS[350], cell=wrong)
    with pytest.raises(GenerationBroken, match="is not the state"):
        await make(bus, tmp_path)
    assert server.ledger.first_sequence == 1


async def test_a_request_that_has_not_ended_keeps_what_it_cites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bus = a_server()
    await two(bus)
    newest = state_at(LATER.sequence)
    requests: Any = newest.actors["requests"].state
    name, request = next((n, r) for n, r in requests.requests.items() if r.accepted >= FACTS[100].sequence)
    request.status = "running"
    state = generations._state

    def held(cell: str, kept: Any) -> Any:
        found = state(cell, kept)
        return found._replace(cell=newest) if kept.manifest.position == LATER.sequence else found

    with monkeypatch.context() as patch:
        patch.setattr(generations, "_state", held)
        patch.setattr(generations, "_verify", lambda *_: 0)
        made = await make(bus, tmp_path)
    assert made.held_back_by == name and made.dropped == request.accepted - 1 < EARLY.sequence - 1
    accepted = await bus.ledger.get(request.accepted)
    assert accepted is not None and name.encode() in accepted.payload
    made = await make(bus, tmp_path)
    assert (made.first, made.dropped, made.held_back_by) == (request.accepted, EARLY.sequence - 1, "")
    assert Recording.open(made.recording).header.snapshot == EARLY.sequence


async def test_too_young_too_few_too_little(tmp_path: Path) -> None:
    server, bus = a_server()
    with pytest.raises(RotationRefused, match="there are 0"):
        await make(bus, tmp_path)
    await store(bus, EARLY)
    with pytest.raises(RotationRefused, match="there are 1"):
        await make(bus, tmp_path)
    await store(bus, LATER)
    with pytest.raises(RotationRefused, match="older than"):
        await make(bus, tmp_path, keep_seconds=1e9)
    with pytest.raises(RotationRefused, match="could be dropped"):
        await make(bus, tmp_path, least_percent=90)
    assert server.ledger.first_sequence == 1 and not list(tmp_path.iterdir())
