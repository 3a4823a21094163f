"""How fast the engine is beside `generate`, and where the time of a step goes.

Both sides answer the same static batch with the same weights, in turns, so that a busy machine slows both. A figure of
the engine holds everything it does: prefill in chunks, decoding, choosing tokens, text. `generate` gives tokens alone.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_legacy import profile
from transformers import GenerationConfig

from models.architecture import describe
from models.contract import Sampling, SequenceStart
from models.detokenizer import Decode
from models.engine import DEFAULT_PREFILL_CHUNK, SlotEngine
from models.instance import load_decode, load_model
from models.sample import make_sample

BATCHES = (1, 4, 16)
CONTEXTS = (128, 1024)
PROMPT_TOKENS = 64
_ATTENTION = ("scaled_dot_product", "flash_attention", "_efficient_attention")
_PRODUCTS = ("addmm", "::mm", "::bmm", "::linear", "mkldnn", "grouped_mm")
_CACHE = ("index_put",)
_WINDOWS, _WINDOW_STEPS = 5, 4


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second of answers to a static batch, median of the rounds; `ratio` is the median of their ratios."""

    sequences: int
    engine_tokens_per_s: float
    generate_tokens_per_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class MixedThroughput:
    """Tokens per second of answers of different lengths, only those that were asked for counted.

    `generate` answers `slots` requests at a time and each batch lasts as long as its longest answer; the engine has
    as many slots and refills them. Medians as of `Throughput`.
    """

    requests: int
    slots: int
    shortest: int
    longest: int
    engine_tokens_per_s: float
    generate_tokens_per_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Time of one decode step, and where it goes, in milliseconds.

    `step_ms` is the median without a profiler. The other times are from a profiled run: attention, matrix products,
    writes into the cache and other operators are their own time, framework is what is left of the profiled step, the
    profiler's own cost included; medians over windows of a few steps.
    """

    sequences: int
    context: int
    step_ms: float
    attention_ms: float
    products_ms: float
    cache_ms: float
    other_ms: float
    framework_ms: float


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Everything that `longshore bench engine` shows."""

    model: str
    parameters: int
    dtype: str
    threads: int
    throughput: tuple[Throughput, ...]
    mixed: MixedThroughput
    steps: tuple[StepTime, ...]
    growth_ms: float
    attention_growth_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def measure(
    *,
    arch: str = "llama",
    parameters: int = 60_000_000,
    dtype: str = "float32",
    rounds: int = 5,
    answer_tokens: int = 64,
    steps: int = 24,
    contexts: tuple[int, int] = CONTEXTS,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> EngineFigures:
    """Make a sample of this kind and measure the engine on it."""
    with tempfile.TemporaryDirectory(prefix="longshore-bench-") as folder:
        progress("making the sample")
        directory = Path(folder) / "sample"
        longest = max(contexts) + steps + _WINDOWS * _WINDOW_STEPS + 8
        sample = make_sample(directory, arch=arch, parameters=parameters, seed=7, dtype=dtype, context=longest)
        model = load_model(directory, None, device=device)
        # Nothing ends an answer, nothing is drawn.
        model.generation_config = GenerationConfig(pad_token_id=model.config.pad_token_id)  # type: ignore[no-untyped-call]
        decode = load_decode(directory)
        engine = _engine(model, longest, decode)
        throughput = []
        for sequences in BATCHES:
            progress(f"{sequences} sequences beside generate")
            throughput.append(_beside_generate(engine, model, sequences, rounds, answer_tokens, sample.vocabulary))
        progress("answers of different lengths beside generate")
        mixed = _mixed_beside_generate(engine, model, rounds, 2 * answer_tokens, sample.vocabulary)
        filled = []
        for context in contexts:
            progress(f"prefill of {max(BATCHES)} sequences up to {context}")
            filled.append(_filled(_engine(model, longest, decode), context, steps, sample.vocabulary))
        progress("decode steps")
        timed = _step_times(filled, contexts, steps)
        return EngineFigures(
            model=arch,
            parameters=sample.parameters,
            dtype=dtype,
            threads=torch.get_num_threads(),
            throughput=tuple(throughput),
            mixed=mixed,
            steps=tuple(timed),
            growth_ms=timed[-1].step_ms - timed[0].step_ms,
            attention_growth_ms=timed[-1].attention_ms - timed[0].attention_ms,
        )


def _engine(model: Any, context: int, decode: Decode) -> SlotEngine:
    return SlotEngine(
        model,
        describe(model),
        decode,
        eos=(),
        kv_bytes=2**40,
        context=context,
        max_slots=max(BATCHES),
    )


def _prompts(sequences: int, tokens: int, vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(sequences)
    drawn = torch.randint(8, vocabulary, (sequences, tokens), generator=generator)
    return [tuple(row) for row in drawn.tolist()]


def _beside_generate(
    engine: SlotEngine, model: Any, sequences: int, rounds: int, answer_tokens: int, vocabulary: int
) -> Throughput:
    prompts = _prompts(sequences, PROMPT_TOKENS, vocabulary)
    batch = torch.tensor(prompts, device=model.device)

    def with_engine() -> None:
        for index, prompt in enumerate(prompts):
            engine.admit(SequenceStart(str(index), prompt, (), Sampling(max_tokens=answer_tokens)))
        while engine.active():
            engine.step()

    def with_generate() -> None:
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=answer_tokens,
            do_sample=False,
        )
        output.tolist()  # both sides end with the tokens at hand, also on a device that computes behind our back

    with_engine()
    with_generate()
    engine_s, generate_s = [], []
    for _ in range(rounds):
        engine_s.append(_seconds(with_engine))
        generate_s.append(_seconds(with_generate))
    tokens = sequences * answer_tokens
    return Throughput(
        sequences=sequences,
        engine_tokens_per_s=tokens / statistics.median(engine_s),
        generate_tokens_per_s=tokens / statistics.median(generate_s),
        ratio=statistics.median(other / own for own, other in zip(engine_s, generate_s, strict=True)),
    )


def _mixed_beside_generate(
    engine: SlotEngine, model: Any, rounds: int, longest: int, vocabulary: int
) -> MixedThroughput:
    slots, shortest = max(BATCHES), max(1, longest // 12)
    requests = 3 * slots
    prompts = _prompts(requests, PROMPT_TOKENS, vocabulary)
    drawn = torch.randint(shortest, longest + 1, (requests,), generator=torch.Generator().manual_seed(1))
    lengths: list[int] = drawn.tolist()
    groups = [range(first, first + slots) for first in range(0, requests, slots)]
    batches = [
        (torch.tensor([prompts[index] for index in group], device=model.device), max(lengths[index] for index in group))
        for group in groups
    ]

    def with_engine() -> None:
        waiting = [
            SequenceStart(str(index), prompt, (), Sampling(max_tokens=lengths[index]))
            for index, prompt in reversed(list(enumerate(prompts)))
        ]
        while waiting or engine.active():
            while waiting and engine.active() < slots:
                engine.admit(waiting.pop())
            engine.step()

    def with_generate() -> None:
        for batch, tokens in batches:
            output = model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=tokens, do_sample=False
            )
            output.tolist()

    with_engine()
    with_generate()
    engine_s, generate_s = [], []
    for _ in range(rounds):
        engine_s.append(_seconds(with_engine))
        generate_s.append(_seconds(with_generate))
    return MixedThroughput(
        requests=requests,
        slots=slots,
        shortest=shortest,
        longest=longest,
        engine_tokens_per_s=sum(lengths) / statistics.median(engine_s),
        generate_tokens_per_s=sum(lengths) / statistics.median(generate_s),
        ratio=statistics.median(other / own for own, other in zip(engine_s, generate_s, strict=True)),
    )


def _filled(engine: SlotEngine, context: int, steps: int, vocabulary: int) -> SlotEngine:
    """The engine with all slots decoding, half of the timed steps before `context`."""
    # The first rows decode while the last are still in prefill: a shorter prompt makes up for it, so that in the
    # timed steps every row stands near `context`, and no two at the same place, as in real traffic.
    chunks = -(-context // DEFAULT_PREFILL_CHUNK)
    for index in range(engine.slots):
        ahead = steps // 2 + chunks * (engine.slots - index) + index % 5
        prompt = _prompts(1, max(1, context - ahead), vocabulary)[0]
        engine.admit(SequenceStart(str(index), prompt, (), Sampling(max_tokens=engine.context)))
    begun: set[str] = set()
    while len(begun) < engine.slots:
        begun |= {event.key for event in engine.step()}
    return engine


def _step_times(engines: Sequence[SlotEngine], contexts: Sequence[int], steps: int) -> list[StepTime]:
    """Steps of the engines in turns, so that a busy machine slows all of them; then profiled ones, in turns too."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(steps):
        for engine, taken in zip(engines, times, strict=True):
            taken.append(_seconds(engine.step))
    windows: list[list[dict[str, float]]] = [[] for _ in engines]
    for _ in range(_WINDOWS):
        for engine, spent in zip(engines, windows, strict=True):
            spent.append(_profile(engine))
    return [
        StepTime(
            sequences=engine.slots,
            context=context,
            step_ms=1000 * statistics.median(taken),
            **{kind: statistics.median(window[kind] for window in spent) for kind in spent[0]},
        )
        for engine, context, taken, spent in zip(engines, contexts, times, windows, strict=True)
    ]


def _profile(engine: SlotEngine) -> dict[str, float]:
    """Milliseconds per step of each kind of operator, and of what is none."""
    with profile() as profiler:  # type: ignore[no-untyped-call]  # the newer one prints to stderr
        total = sum(_seconds(engine.step) for _ in range(_WINDOW_STEPS))
    spent = dict.fromkeys(("attention_ms", "products_ms", "cache_ms", "other_ms"), 0.0)
    for operator in profiler.key_averages():
        spent[_kind(operator.key)] += operator.self_cpu_time_total / 1000 / _WINDOW_STEPS
    return spent | {"framework_ms": 1000 * total / _WINDOW_STEPS - sum(spent.values())}


def _kind(operator: str) -> str:
    for names, kind in ((_ATTENTION, "attention_ms"), (_PRODUCTS, "products_ms"), (_CACHE, "cache_ms")):
        if any(name in operator for name in names):
            return kind
    return "other_ms"


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tables(figures: EngineFigures) -> Sequence[Any]:
    """The figures as rich tables."""
    from rich.table import Table

    throughput = Table(
        title=f"{figures.model}, {figures.parameters / 1e6:.0f}M parameters, {figures.dtype}, "
        f"{figures.threads} threads: tokens/s"
    )
    for name in ("sequences", "engine", "generate", "engine / generate"):
        throughput.add_column(name, justify="right")
    for row in figures.throughput:
        throughput.add_row(
            str(row.sequences), f"{row.engine_tokens_per_s:.1f}", f"{row.generate_tokens_per_s:.1f}", f"{row.ratio:.2f}"
        )
    mixed = figures.mixed
    throughput.add_row(
        f"{mixed.requests} over {mixed.slots}, {mixed.shortest}-{mixed.longest} tokens",
        f"{mixed.engine_tokens_per_s:.1f}",
        f"{mixed.generate_tokens_per_s:.1f}",
        f"{mixed.ratio:.2f}",
    )
    steps = Table(
        title="one decode step, ms",
        caption=f"from {figures.steps[0].context} to {figures.steps[-1].context} the step grows "
        f"by {figures.growth_ms:.1f} ms, attention by {figures.attention_growth_ms:.1f} ms",
    )
    for name in ("sequences", "context", "step", "attention", "products", "cache", "other ops", "framework"):
        steps.add_column(name, justify="right")
    for timed in figures.steps:
        spent = (timed.attention_ms, timed.products_ms, timed.cache_ms, timed.other_ms, timed.framework_ms)
        steps.add_row(
            str(timed.sequences), str(timed.context), f"{timed.step_ms:.1f}", *(f"{value:.1f}" for value in spent)
        )
    return throughput, steps
