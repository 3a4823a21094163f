"""`longshore tail`, `longshore record` and `longshore ask`: what anybody with a NATS address can do."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus.errors import UserError
from bus.options import DEFAULT_CELL, DEFAULT_NATS, CellOption, Failure, JsonOption, NatsOption, connected

if TYPE_CHECKING:
    from bus.answer import Answer
    from bus.ask_output import AskOutput
    from bus.client import Client
    from bus.contract import Bus, Record
    from bus.sentences import Event
    from bus.subjects import Subjects

RECENT_EVENTS = 20
INTERRUPTED = 130


# ---- tail ---------------------------------------------------------------------------------------------------


async def tail(
    since: Annotated[
        int | None, typer.Option("--since", metavar="SEQUENCE", min=0, help="Begin at this ledger sequence.")
    ] = None,
    request: Annotated[
        str, typer.Option("--request", metavar="ID", help="Only what concerns this request (its first digits will do).")
    ] = "",
    kind: Annotated[
        str,
        typer.Option("--kind", metavar="KIND", help="Only kinds that begin so, such as `sequence` or `model.load`."),
    ] = "",
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for new events, or end at the last.")
    ] = True,
    as_json: JsonOption = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
) -> None:
    """Show the ledger, one event per line, each as a sentence, live until Ctrl-C.

    Without --since it begins with the last 20 events; with --request, --kind or --no-follow with the first one.

    Example: longshore tail --request 3f2a --since 1
    """
    from bus.sentences import read_event
    from bus.subjects import Subjects

    show = _json_line if as_json else _sentence_line()
    async with connected(nats, cell) as bus:
        subjects = Subjects(cell)
        request = request.rstrip("…")  # as sentences show it
        usage = await bus.ledger.usage()
        whole = bool(request or kind) or not follow
        start = since if since is not None else (1 if whole else usage.last_sequence - RECENT_EVENTS + 1)
        last = None if follow else usage.last_sequence
        wanted = _Wanted(subjects, request, kind)
        async for record in _records(bus, max(1, start), last):
            if wanted(record):
                show(read_event(subjects, record))


async def _records(bus: Bus, start: int, last: int | None) -> AsyncIterator[Record]:
    """The ledger from `start` on; up to `last`, or for ever. Output is flushed whenever nothing more is there."""
    if last is not None and start > last:
        return
    reader = await bus.ledger.read(start=start)
    try:
        while True:
            for record in await reader.batch():
                yield record
                if last is not None and record.sequence >= last:
                    return
            sys.stdout.flush()
    finally:
        await reader.close()


class _Wanted:
    """Which records of the ledger are shown: of a kind, of a request and of its several answers."""

    def __init__(self, subjects: Subjects, request: str, kind: str) -> None:
        self._subjects = subjects
        self._kind = kind
        self._marks = [f'"{name}":"{request}'.encode() for name in ("request", "wanted_by")] if request else []
        self._family = f'"family":"{request}'.encode()
        self._listed = f'"{request}'.encode()

    def __call__(self, record: Record) -> bool:
        if self._marks and self._family in record.payload:
            # An answer of the request, which has an id of its own: what else is about that is wanted, too.
            mark = record.payload.partition(b'"request":')[2].partition(b",")[0]
            if mark and (mark := b'"request":' + mark) not in self._marks:
                self._marks.append(mark)
        if self._kind:
            place = self._subjects.parse(record.subject)
            if place is None or not place.kind.startswith(self._kind):
                return False
        if not self._marks or self._family in record.payload or any(mark in record.payload for mark in self._marks):
            return True
        # It names the requests that it moves in a list.
        return record.subject.endswith(".placement.spread") and self._listed in record.payload


def _json_line(event: Event) -> None:
    sys.stdout.write(json.dumps(event.as_json()) + "\n")


def _clock(timestamp: int) -> str:
    whole, rest = divmod(timestamp, 1_000_000_000)
    return time.strftime("%H:%M:%S", time.localtime(whole)) + f".{rest // 1_000_000:03d}"


def _sentence_line() -> Callable[[Event], None]:
    """Prints an event as sequence, time and sentence; in colours on a terminal."""
    if not sys.stdout.isatty():

        def plain(event: Event) -> None:
            sys.stdout.write(f"{event.sequence:>8}  {_clock(event.timestamp)}  {event.kind:<20}  {event.text}\n")

        return plain

    from rich.console import Console
    from rich.text import Text

    from bus.sentences import style_of

    console = Console(highlight=False)

    def coloured(event: Event) -> None:
        line = Text(f"{event.sequence:>8}  {_clock(event.timestamp)}  ", style="dim")
        line.append(f"{event.kind:<20}  ", style=style_of(event.kind))
        line.append(event.text, style="not dim")
        console.print(line, soft_wrap=True)

    return coloured


# ---- record -------------------------------------------------------------------------------------------------


async def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists.")] = False,
    as_json: JsonOption = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
) -> None:
    """Write the ledger and all tokens, up to now, to one file that `longshore replay` reads without NATS.

    Example: longshore record incident.lsrec
    """
    import msgspec

    from bus.recording import RecordingWriter, write_recording

    # Before anything else: nobody should wait for a connection to hear that the file is in the way.
    RecordingWriter(file, cell, 0, force=force).abandon()
    started = time.monotonic()
    async with connected(nats, cell) as bus:
        if as_json or not sys.stderr.isatty():
            header = await write_recording(file, bus, cell=cell, force=force)
        else:
            from rich.console import Console
            from rich.progress import Progress

            with Progress(console=Console(stderr=True), transient=True) as bars:
                tasks: dict[str, Any] = {}

                def progress(stream: str, at: int, last: int) -> None:
                    if stream not in tasks:
                        tasks[stream] = bars.add_task(stream, total=last)
                    bars.update(tasks[stream], completed=at, total=last)

                header = await write_recording(file, bus, cell=cell, progress=progress, force=force)
    seconds = time.monotonic() - started
    size = file.stat().st_size
    if as_json:
        data = {"file": str(file), "bytes": size, "seconds": round(seconds, 3)} | msgspec.to_builtins(header)
        print(json.dumps(data))
        return
    print(
        f"{file}: {header.ledger.records} records of the ledger (up to sequence {header.ledger.last}) and "
        f"{header.tokens.records} of tokens, {size / 1e6:.1f} MB in {seconds:.1f} s"
    )


# ---- ask ----------------------------------------------------------------------------------------------------


async def ask(
    model: Annotated[str, typer.Argument(metavar="NAME", help="The model.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.", show_default=False)],
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a message of a user, by the chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message before it; implies --chat.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="At most so many tokens (256).")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from this share of probability.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from so many candidates; 0 for all.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same sample.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    stop_token: Annotated[
        list[int] | None, typer.Option("--stop-token", metavar="ID", help="End at this token; may be repeated.")
    ] = None,
    min_tokens: Annotated[int | None, typer.Option("--min-tokens", help="No end before so many tokens.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: less of what was said in prompt or answer.")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option("--presence-penalty", help="-2 to 2; above 0: less of what the answer has said.")
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option("--frequency-penalty", help="-2 to 2; above 0: the less, the oftener it was said."),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", metavar="ID=NUMBER", help="Add this to the token's logit; may be repeated."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="Show each token's log-probability and so many alternatives."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", metavar="COUNT", help="So many answers (1-16).")] = None,
    priority: Annotated[int | None, typer.Option("--priority", help="-100 to 100; larger goes first.")] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="Idempotency key: the same one attaches to its answer.")
    ] = None,
    as_json: JsonOption = False,
    nats: NatsOption = DEFAULT_NATS,
    cell: CellOption = DEFAULT_CELL,
) -> None:
    """Ask a model and print its answer as it comes. Ctrl-C cancels the request in the cell, too.

    Example: longshore ask llama-a "Once upon a time" --max-tokens 64 --temperature 0.8
    """
    from bus.answer import Patience, RequestFailed
    from bus.ask_output import AskOutput
    from bus.client import Client

    text = sys.stdin.read() if prompt == "-" else prompt
    given: dict[str, Any] = {"prompt": text}
    if chat or system is not None:
        messages = [{"role": "system", "content": system}] if system is not None else []
        given = {"messages": [*messages, {"role": "user", "content": text}]}
    given |= {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    given |= {"min_tokens": min_tokens, "stop_tokens": stop_token or None, "priority": priority}
    given |= {"repetition_penalty": repetition_penalty, "logit_bias": _biases(logit_bias)}
    given |= {"logprobs": logprobs, "n": n}
    given |= {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
    async with connected(nats, cell) as bus:
        client = Client(bus, cell, patience=Patience(nobody=2.0))
        try:
            answer = client.infer(model, **given, stop=stop or None, key=key)
            await _print_answer(client, answer, AskOutput(as_json=as_json, several=bool(n and n > 1)))
        except RequestFailed as failure:
            raise _told(failure, as_json) from None


def _biases(options: list[str] | None) -> dict[str, float] | None:
    """ID=NUMBER options as the field that they stand for."""
    biases = {}
    for option in options or ():
        token, _, number = option.partition("=")
        try:
            biases[str(int(token))] = float(number)
        except ValueError:
            raise UserError(f"--logit-bias must be ID=NUMBER, such as 42=-100, got {option}") from None
    return biases or None


async def _print_answer(client: Client, answer: Answer, output: AskOutput) -> None:
    try:
        async for chunk in answer:
            output.show(chunk)
    except asyncio.CancelledError:
        await _cancel(client, answer)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        output.close()
    if answer.end in ("cancelled", "deadline"):
        how = "was cancelled" if answer.end == "cancelled" else "went past its deadline"
        raise Failure(f"request {answer.request_id} {how} after {answer.position} tokens")


async def _cancel(client: Client, answer: Answer) -> None:
    """After Ctrl-C: end the request in the cell, and say what came of that."""
    from bus.answer import RequestFailed

    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
    try:
        async with asyncio.timeout(3.0):
            await client.cancel(answer.request_id)
        print(f"\ncancelled request {answer.request_id}", file=sys.stderr)
    except (RequestFailed, TimeoutError) as error:
        reason = str(error) or "no answer"
        print(f"\nrequest {answer.request_id} may go on, cancelling it failed: {reason}", file=sys.stderr)


def _told(failure: Any, as_json: bool) -> UserError:
    if as_json:
        body = {"code": failure.code, "message": failure.message} | (
            {"retry_ms": failure.retry_ms} if failure.retry_ms else {}
        )
        print(json.dumps({"error": body}), flush=True)
    said = not failure.retry_ms or f"{failure.retry_ms} ms" in failure.message
    again = "" if said else f"; come again in {failure.retry_ms} ms"
    kind = UserError if failure.code in ("bad_request", "too_large", "unknown_model", "key_reused") else Failure
    return kind(f"{failure.message}{again}")
