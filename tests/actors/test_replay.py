"""Replay: what was recorded is compared with what the code computes; the first difference is named, exit code 1.

The planted changes run in a copy of the source, so what is shown is the real command finding a real change.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import Raw

from actors.bench_replay import CELL, make_ledger
from actors.cell import Cell
from actors.replay import collect_accepted, state_at, verify
from bus.contract import Record
from bus.messages import CancelRequested, DifferenceAccepted, FactEnvelope, decode_said, encode
from bus.recording import RecordingWriter

CANCEL = encode(FactEnvelope("intake", Raw(encode(CancelRequested("0" * 32)))))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return make_ledger(1500)


@pytest.fixture(scope="module")
def recording(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "sound.lsrec"
    write(path, records)
    return path


def write(path: Path, records: list[Record]) -> None:
    with RecordingWriter(path, CELL, records[-1].timestamp) as writer:
        for record in records:
            writer.add("ledger", record)


def replay(recording: Path, *arguments: str, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command itself, without torch, models or a server: importing torch would fail."""
    block = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from bus.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", block, "replay", str(recording), *arguments],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source), "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_sound_recording_verifies(records: list[Record]) -> None:
    verdict = verify(CELL, records)
    assert verdict.difference is None
    assert verdict.verified == sum(".said." in record.subject for record in records)
    assert verdict.pending == 0


def test_the_command_verifies_without_torch_or_nats(recording: Path) -> None:
    done = replay(recording, "--verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["difference"] is None


def test_state_at_is_the_cell_at_that_sequence(recording: Path, records: list[Record]) -> None:
    cell = Cell(CELL)
    for record in records[:700]:
        cell.take(record)
    done = replay(recording, "--at", "700", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == cell.digest() == state_at(CELL, records, 700).digest()


PLANTED = {
    # One line each; what it changes must be named by message and field.
    "the worst candidate is chosen": (
        "placement_pump.py",
        "chosen = options[0]",
        "chosen = options[-1]",
        "instance.start",
    ),
    "a slot less is given": (
        "placement_state.py",
        "return slots, slots * per_slot",
        "return slots - 1, slots * per_slot",
        "slots",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_change_is_found_and_named(planted: str, recording: Path, tmp_path: Path) -> None:
    file, line, changed, named = PLANTED[planted]
    for room in ("actors", "bus"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "actors" / file
    text = path.read_text()
    assert text.count(line) == 1
    path.write_text(text.replace(line, changed))
    done = replay(recording, "--verify", source=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "difference at ledger sequence" in done.stdout
    assert named in done.stdout
    assert "recorded" in done.stdout and "computed" in done.stdout


def test_a_changed_field_is_named(records: list[Record]) -> None:
    place = next(i for i, r in enumerate(records) if r.subject.endswith(".request.placed"))
    wrong = records[place]._replace(payload=records[place].payload.replace(b'"worker":"gpu/s1', b'"worker":"gpu/s9'))
    verdict = verify(CELL, [*records[:place], wrong, *records[place + 1 :]])
    assert verdict.difference is not None
    assert verdict.difference["sequence"] == records[place].sequence
    assert verdict.difference["message"] == "request.placed"
    assert verdict.difference["field"] == "body.worker"


def test_a_missing_message_is_a_difference(records: list[Record]) -> None:
    place = next(i for i, r in enumerate(records) if r.subject.endswith(".request.placed"))
    last = records[-1]
    later = Record(
        last.sequence + 1, last.timestamp + 10**10, f"longshore.{CELL}.fact.requests.cancel.requested", CANCEL
    )
    verdict = verify(CELL, [*records[:place], *records[place + 1 :], later])
    assert verdict.difference is not None
    assert verdict.difference["recorded"] == "no such message"


def test_an_extra_message_is_a_difference(records: list[Record]) -> None:
    place = next(i for i, r in enumerate(records) if r.subject.endswith(".request.placed"))
    payload = records[place].payload
    index = decode_said(payload).index
    extra = records[place]._replace(payload=payload.replace(b'"index":%d' % index, b'"index":77'))
    verdict = verify(CELL, [*records[: place + 1], extra, *records[place + 1 :]])
    assert verdict.difference is not None
    assert verdict.difference["field"] == "index"


def test_repeats_are_no_difference(records: list[Record]) -> None:
    doubled = [record for record in records for _ in range(2 if ".said." in record.subject else 1)]
    assert verify(CELL, doubled).difference is None


def test_an_accepted_difference_stands(records: list[Record]) -> None:
    place = next(i for i, r in enumerate(records) if r.subject.endswith(".request.placed"))
    envelope = decode_said(records[place].payload)
    wrong = records[place]._replace(payload=records[place].payload.replace(b'"worker":"gpu/s1', b'"worker":"gpu/s9'))
    accepted = DifferenceAccepted(envelope.fact, envelope.index)
    fact = Record(
        records[-1].sequence + 1,
        records[-1].timestamp,
        f"longshore.{CELL}.fact.cell.difference.accepted",
        encode(FactEnvelope("operator", Raw(encode(accepted)))),
    )
    all_records = [*records[:place], wrong, *records[place + 1 :], fact]
    assert verify(CELL, all_records).difference is not None
    assert verify(CELL, all_records, accepted=collect_accepted(all_records)).difference is None


def test_the_end_of_a_recording_may_lack_what_was_not_written_yet(records: list[Record]) -> None:
    last_fact = max(i for i, r in enumerate(records) if ".fact." in r.subject)
    verdict = verify(CELL, records[: last_fact + 1])
    assert verdict.difference is None
    assert verdict.pending > 0


def test_a_damaged_recording_is_one_sentence(recording: Path, tmp_path: Path) -> None:
    data = bytearray(recording.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "damaged.lsrec"
    path.write_bytes(data)
    done = replay(path, "--verify")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert str(path) in done.stderr
