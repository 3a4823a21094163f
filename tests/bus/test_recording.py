"""A recording holds both streams as they were, or says in one sentence what is wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.contract import Record
from bus.memory import MemoryServer
from bus.messages import FactEnvelope, RulesActivated, encode
from bus.pages import Page, PageSequence, Seal, decode_page, encode_page
from bus.recording import BLOCK_RECORDS, Bounds, Recording, RecordingError, RecordingWriter, write_recording
from bus.subjects import Subjects

SUBJECTS = Subjects("main")


def records(count: int, first: int = 1, step: int = 1) -> list[Record]:
    subject = SUBJECTS.fact("requests", "request.accepted")
    return [Record(first + i * step, 10**18 + i, subject, b"x%d" % i, "boot") for i in range(count)]


def write(path: Path, ledger: list[Record], tokens: Sequence[Record] = ()) -> Path:
    with RecordingWriter(path, "main", 5) as writer:
        for record in ledger:
            writer.add("ledger", record)
        for record in tokens:
            writer.add("tokens", record)
    return path


@pytest.mark.parametrize("count", [0, 1, BLOCK_RECORDS, 2 * BLOCK_RECORDS + 1])
def test_what_was_written_is_read(tmp_path: Path, count: int) -> None:
    ledger, tokens = records(count), records(count // 2, 7, 3)
    recording = Recording.open(write(tmp_path / "r", ledger, tokens))
    assert list(recording.ledger()) == ledger and list(recording.tokens()) == tokens
    assert recording.verify() == len(ledger) + len(tokens)
    header = recording.header
    assert (header.cell, header.recorded_at, header.ledger.records) == ("main", 5, count)
    assert header.ledger == (Bounds(count, 1, count) if count else Bounds())
    for start in (0, 1, 2, BLOCK_RECORDS, BLOCK_RECORDS + 1, count, count + 1):
        assert list(recording.ledger(start)) == [record for record in ledger if record.sequence >= start]


def test_a_snapshot_stands_before_the_ledger_that_goes_on_from_it(tmp_path: Path) -> None:
    body = bytes(range(256)) * 10_000
    ledger = records(5000, 101)
    with RecordingWriter(tmp_path / "r", "main", 5) as writer:
        writer.start_from(103, body)
        for record in ledger:
            writer.add("ledger", record)
    data = (tmp_path / "r").read_bytes()
    assert data[:8] == b"LONGREC\x02" and data[-8:] == b"LONGEND\x02"
    recording = Recording.open(tmp_path / "r")
    assert (recording.header.snapshot, recording.snapshot()) == (103, body)
    assert list(recording.ledger()) == ledger and recording.verify() == 5003
    for at in (7, 5000, len(data) // 3, len(data) - 1):
        (tmp_path / "r").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(RecordingError):
            Recording.open(tmp_path / "r").verify()
    plain = Recording.open(write(tmp_path / "plain", records(3)))
    assert (plain.header.snapshot, plain.snapshot()) == (0, b"")
    assert (tmp_path / "plain").read_bytes()[:8] == b"LONGREC\x01", "what needs no snapshot is read by older releases"


def test_a_running_cell_is_recorded_up_to_where_it_was(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = MemoryServer("main")
        bus = server.bus("one")
        for i in range(5000):
            bus.ledger.send(SUBJECTS.fact("requests", "request.accepted"), b"%d" % i, publisher="boot")
        payload = encode(FactEnvelope("operator", msgspec.Raw(encode(RulesActivated(3)))))
        await bus.ledger.append(SUBJECTS.fact("cell", "rules.activated"), payload)
        page = Page(0, (PageSequence("r", 1, 0, (5, 6), ("a", "b")),))
        await bus.tokens.append(SUBJECTS.tokens("gpu/s1/0", 3), encode_page(page))
        seen: list[tuple[str, int, int]] = []

        def progress(stream: str, at: int, last: int) -> None:
            seen.append((stream, at, last))
            bus.ledger.send(SUBJECTS.fact("requests", "request.accepted"), b"later")

        header = await write_recording(tmp_path / "r", bus, cell="main", progress=progress)
        assert header.ledger == Bounds(5001, 1, 5001) and header.tokens == Bounds(1, 1, 1)
        assert header.rules == ((0, 1), (5001, 3))
        recording = Recording.open(tmp_path / "r")
        assert [record.payload for record in recording.ledger()][:5000] == [b"%d" % i for i in range(5000)]
        assert next(recording.ledger()).publisher == "boot"
        assert [decode_page(record.payload) for record in recording.tokens()] == [page]
        assert seen[-1] == ("tokens", 1, 1) and ("ledger", 5001, 5001) in seen

    asyncio.run(scenario())


def test_a_cell_without_records_gives_an_empty_recording(tmp_path: Path) -> None:
    async def scenario() -> None:
        header = await write_recording(tmp_path / "r", MemoryServer("main").bus("one"), cell="main")
        assert header.ledger == header.tokens == Bounds()

    asyncio.run(scenario())
    assert Recording.open(tmp_path / "r").verify() == 0


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RecordingWriter(tmp_path / "r", "main", 5) as writer:
        writer.add("ledger", records(1)[0])
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecordingError, match="cannot be written: No such file or directory"):
        RecordingWriter(tmp_path / "none" / "r", "main", 5)
    with pytest.raises(RecordingError, match="is a directory: name a file"):
        RecordingWriter(tmp_path, "main", 5)


def test_an_existing_file_is_overwritten_only_by_force(tmp_path: Path) -> None:
    path = write(tmp_path / "r", records(3))
    with pytest.raises(RecordingError, match="exists: name another file, or overwrite it with --force"):
        RecordingWriter(path, "main", 5)
    assert Recording.open(path).verify() == 3
    with RecordingWriter(path, "main", 5, force=True) as writer:
        writer.add("ledger", records(1)[0])
    assert Recording.open(path).verify() == 1


def test_sequences_must_rise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ledger: sequence 1 after 1"):
        write(tmp_path / "r", [*records(1), *records(1)])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: b"hello", "is not a recording"),
        (lambda data: b"", "is not a recording"),
        (lambda data: b"LONGREC\x09" + data[8:], "has recording format 9, this program reads up to 2"),
        (lambda data: data[:100], "it ends within its header"),
        (lambda data: data[:5000], "its end is missing"),
        (lambda data: data[:-1], "its end is missing"),
        (lambda data: data[:5000] + data[5001:], "but .* were written"),
        (lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], "the checksum of its header"),
        (lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "the checksum of its trailer"),
    ],
)
def test_damage_is_named_on_opening(tmp_path: Path, damage: object, sentence: str) -> None:
    path = write(tmp_path / "r", records(100))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(RecordingError, match=sentence):
        Recording.open(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("recording") / "r"
    return write(path, records(BLOCK_RECORDS + 10), records(20)).read_bytes()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_that_matters_is_found(recorded: bytes, tmp_path: Path, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(recorded) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "flipped"
    path.write_bytes(recorded[:at] + bytes([recorded[at] ^ bit]) + recorded[at + 1 :])
    used = 12 + int.from_bytes(recorded[8:12], "little") + 16
    if used <= at < 4096:
        assert Recording.open(path).verify() == BLOCK_RECORDS + 30
        return
    with pytest.raises(RecordingError) as caught:
        Recording.open(path).verify()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"none cannot be read: No such file or directory"):
        Recording.open(tmp_path / "none")


def test_pages_and_seals_keep_their_bytes() -> None:
    page = Page(4, (PageSequence("r", 1, 7, (5,), ("a",), end="stop", prompt_tokens=3),))
    assert encode_page(page) == (
        b'{"page":4,"sequences":[{"request":"r","attempt":1,"position":7,"tokens":[5],"texts":["a"],'
        b'"end":"stop","prompt_tokens":3}]}'
    )
    assert encode_page(Seal(True, "watch")) == b'{"seal":true,"by":"watch"}'
    for one in (page, Seal(True, "watch")):
        assert decode_page(encode_page(one)) == one
    for wrong in (b"", b"{}", b"\xff", b'{"page":-1,"sequences":[]}', b'{"seal":false,"by":"x"}', b"[" * 9999):
        with pytest.raises(ValueError, match="not a page of tokens"):
            decode_page(wrong)
    with pytest.raises(ValueError, match="2 tokens, but 1 texts"):
        decode_page(encode_page(page).replace(b"[5]", b"[5,6]"))
