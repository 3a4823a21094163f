"""`longshore tail`, `record` and `ask` on a real server: what they print, and how they fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_cell import FakeCell

from bus import messages as m
from bus.ask_output import AskOutput
from bus.cli import _Wanted
from bus.contract import Record
from bus.jetstream import JetStreamBus
from bus.logprobs import Alternative, TokenLogprobs
from bus.main import GROUP, main
from bus.pages import Page, encode_page
from bus.recording import Recording
from bus.replies import chunk_of
from bus.server import EmbeddedServer
from bus.subjects import Subjects

POINTS = [EntryPoint(name, f"bus.cli:{name}", GROUP) for name in ("tail", "record", "ask")]
REQUEST = "3f2a91c0" + "0" * 24


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments), POINTS)
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def filled(nats_server: EmbeddedServer) -> list[str]:
    """Options that name a cell whose ledger holds thirty facts, the last one about REQUEST, and one page."""

    async def fill() -> None:
        bus = await JetStreamBus.connect(nats_server.url, "commands", create=True)
        subjects = Subjects("commands")

        async def state(actor: str, message: m.Message) -> None:
            fact = m.FactEnvelope("operator", msgspec.Raw(m.encode(message)))
            await bus.ledger.append(subjects.fact(actor, m.kind_of(message)), m.encode(fact))

        for i in range(29):
            await state("placement", m.ModelAdded(f"model-{i}"))
        await state("requests", m.CancelRequested(REQUEST))
        await bus.tokens.append(subjects.tokens("gpu/s1/0", 3), encode_page(Page(0, ())))
        await bus.close()

    asyncio.run(fill())
    return ["--nats", nats_server.url, "--cell", "commands"]


def test_tail_shows_sentences(filled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tail", "--no-follow", *filled) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    assert lines[0].split()[0] == "1" and lines[0].endswith("model.added           model model-0 was added")
    assert lines[-1].endswith("request 3f2a91c0… is to be cancelled")


def test_tail_filters(filled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tail", "--no-follow", "--since", "28", "--kind", "model", *filled) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["28", "29"]
    assert run("tail", "--no-follow", "--request", "3f2a91", "--json", *filled) == 0
    (event,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (event["sequence"], event["kind"], event["sender"]) == (30, "cancel.requested", "operator")
    assert event["envelope"]["body"]["request"] == REQUEST
    assert run("tail", "--no-follow", "--since", "31", *filled) == 0
    assert capsys.readouterr().out == ""


def test_tail_follows_until_interrupted(filled: list[str]) -> None:
    with started("tail", *filled) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline() for _ in range(20)]
        assert seen[0].split()[0] == b"11" and seen[-1].split()[0] == b"30"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    code = (
        "import sys; from importlib.metadata import EntryPoint; from bus.main import GROUP, main; "
        "main(sys.argv[1:], [EntryPoint(n, 'bus.cli:' + n, GROUP) for n in ('tail', 'record', 'ask')])"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def test_record_writes_a_file_that_opens(filled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r"
    assert run("record", str(file), *filled) == 0
    assert "30 records of the ledger (up to sequence 30) and 1 of tokens" in capsys.readouterr().out
    recording = Recording.open(file)
    assert recording.verify() == 31 and recording.header.cell == "commands"
    assert run("record", str(file), *filled) == 2
    assert capsys.readouterr().err == f"longshore: {file} exists: name another file, or overwrite it with --force\n"
    assert run("record", str(file), "--force", "--json", *filled) == 0
    assert json.loads(capsys.readouterr().out)["ledger"] == {"records": 30, "first": 1, "last": 30}


@pytest.mark.parametrize("command", [["tail"], ["record", "x"], ["ask", "a", "hello"]], ids=["tail", "record", "ask"])
def test_where_no_server_is_one_sentence_says_so(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*command, "--nats", "nats://127.0.0.1:1") == 1
    error = capsys.readouterr().err
    assert error.startswith("longshore: no NATS server answers at nats://127.0.0.1:1: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_where_no_cell_is_one_sentence_says_so(nats_server: EmbeddedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tail", "--nats", nats_server.url, "--cell", "nowhere") == 1
    error = capsys.readouterr().err
    assert "LEDGER_nowhere does not exist" in error and "longshore up" in error and error.count("\n") == 1
    assert run("ask", "a", "hello", "--nats", nats_server.url, "--cell", "nowhere") == 1
    assert "nobody listens on longshore.nowhere.infer.a" in capsys.readouterr().err
    assert run("tail", "--nats", nats_server.url, "--cell", "no.where") == 2
    assert "--cell 'no.where' is no name of a cell" in capsys.readouterr().err


@contextmanager
def fake_cell(url: str, cell: str, prepare: Callable[[FakeCell], None] = lambda _: None) -> Iterator[FakeCell]:
    """A cell that answers from a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work: Awaitable[Any]) -> Any:
        async def wrapped() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(wrapped(), loop).result(20)

    bus = do(JetStreamBus.connect(url, cell))
    fake = FakeCell(bus, cell=cell)
    prepare(fake)
    try:
        do(fake.__aenter__())
        yield fake
        do(fake.__aexit__())
        do(bus.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def test_ask_prints_the_answer(nats_server: EmbeddedServer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nats", nats_server.url, "--cell", "asked"]
    with fake_cell(nats_server.url, "asked") as fake:
        assert run("ask", "llama-a", "hello", "--system", "be brief", "--max-tokens", "3", "--stop", "x", *options) == 0
        assert capsys.readouterr().out == "".join(f"{p} " for p in range(20)) + "\n"
        _, body = fake.asked[0]
        assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        assert (body["max_tokens"], body["stop"], "prompt" in body) == (3, ["x"], False)
        assert run("ask", "llama-a", "hello", "--json", *options) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["position"] for line in lines] == list(range(20)) and lines[-1]["end"] == "stop"


def test_ask_sends_the_fields_of_sampling(nats_server: EmbeddedServer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nats", nats_server.url, "--cell", "sampled"]
    given = ["--stop-token", "5", "--min-tokens", "2", "--logit-bias", "7=-100", "--logprobs", "1", "--priority=-3"]
    penalties = ["--repetition-penalty", "1.5", "--presence-penalty", "0.5", "--frequency-penalty", "0.25"]
    with fake_cell(nats_server.url, "sampled") as fake:
        assert run("ask", "llama-a", "hello", *given, *penalties, *options) == 0
        body = {key: value for key, value in fake.asked[0][1].items() if key not in ("client", "key", "from", "prompt")}
        assert body == {
            "stop_tokens": [5], "min_tokens": 2, "logit_bias": {"7": -100.0}, "logprobs": 1, "priority": -3,
            "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        }  # fmt: skip
        assert run("ask", "llama-a", "hello", "--logit-bias", "7:1", *options) == 2
        assert "--logit-bias must be ID=NUMBER, such as 42=-100, got 7:1" in capsys.readouterr().err


def test_ask_shows_several_answers_one_by_one_and_tokens_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    output = AskOutput(as_json=False, several=True)
    for choice, text, end in ((1, "one ", ""), (0, "two", ""), (1, "more", "stop"), (2, "lost", "")):
        output.show(chunk_of("r", 0, [1], [text], end=end, choice=choice, n=3 if end else 1))  # type: ignore[arg-type]
    output.close()
    assert capsys.readouterr().out == (
        "--- answer 2 of 3 (stop)\none more\n--- answer 1 (broken off)\ntwo\n--- answer 3 (broken off)\nlost\n"
    )
    output = AskOutput(as_json=False, several=False)
    logprobs = [TokenLogprobs(-0.5, (Alternative(4, -0.25, " b"),))]
    output.show(chunk_of("r", 0, [1], [" a"], logprobs=logprobs))
    output.close()
    assert capsys.readouterr().out == "   -0.500  ' a'             ' b' -0.250\n"


def test_ask_tells_refusals(nats_server: EmbeddedServer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nats", nats_server.url, "--cell", "refused"]
    with fake_cell(nats_server.url, "refused") as fake:
        assert run("ask", "llama-a", "", *options) == 2
        assert capsys.readouterr().err == "longshore: prompt must not be empty\n"
        assert run("ask", "", "hello", *options) == 2
        assert capsys.readouterr().err == "longshore: the name of the model is empty\n"
        assert run("ask", "llama-a", "\udcff", *options) == 2
        assert capsys.readouterr().err == "longshore: the request has a text that is not valid Unicode\n"
        fake.first_word = "refused"
        assert run("ask", "llama-a", "hello", "--json", *options) == 1
        told = capsys.readouterr()
        assert told.err == "longshore: the queue is full: come again; come again in 70 ms\n"
        assert json.loads(told.out)["error"]["retry_ms"] == 70


def test_an_interrupted_ask_cancels_in_the_cell(nats_server: EmbeddedServer) -> None:
    def slow(fake: FakeCell) -> None:
        fake.pause = 0.2

    with (
        fake_cell(nats_server.url, "interrupted", slow) as fake,
        started("ask", "llama-a", "hello", "--nats", nats_server.url, "--cell", "interrupted") as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(2) == b"0 "
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        error = process.stderr.read().decode()
        assert fake.cancelled == list(fake.requests) and f"cancelled request {fake.cancelled[0]}" in error
        assert "Traceback" not in error


@pytest.mark.parametrize("command", ["tail", "record", "ask"])
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"Example: longshore {command} " in capsys.readouterr().out


def test_tail_of_a_request_shows_what_is_about_each_of_its_answers() -> None:
    subjects = Subjects("main")
    wanted = _Wanted(subjects, "aaa", "")

    def seen(body: bytes) -> bool:
        return wanted(Record(1, 1, subjects.said("requests", "placement", "request.place"), b'{"body":' + body + b"}"))

    assert not seen(b'{"request":"bbb1","attempt":1}'), "not known yet"
    assert seen(b'{"request":"aaa1","attempt":1}')
    assert seen(b'{"request":"bbb1","attempt":1,"choice":{"family":"aaa1","index":1,"of":2}}')
    assert seen(b'{"request":"bbb1","attempt":1}'), "an answer of the request, by the id that it has in the cell"
    assert not seen(b'{"request":"ccc1","attempt":1,"choice":{"family":"ddd1","index":1,"of":2}}')
    assert not seen(b'{"request":"ccc1","attempt":1}')
