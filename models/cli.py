"""The commands of this folder: `longshore model sample` and `longshore bench engine`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bus.errors import UserError

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def parse_size(text: str) -> int:
    """A number of parameters: "60M", "1.1B", "400000"; raises typer.BadParameter."""
    digits, unit = (text[:-1], text[-1].upper()) if text and text[-1].upper() in _UNITS else (text, "")
    try:
        size = int(float(digits) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a number of parameters: write it like 60M, 1.1B or 400000.")
    return size


def sample(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must be empty or not exist.")],
    arch: Annotated[
        str,
        typer.Option(
            help="llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma, gemma2, gemma3, gpt2, gpt_neox, opt, phi; "
            "encoders: bert, roberta."
        ),
    ] = "llama",
    size: Annotated[str, typer.Option(help="About how many parameters: 400K, 60M, 1.1B.")] = "60M",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 7,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    std: Annotated[float, typer.Option(help="Standard deviation of the weights; at 0.02 answers repeat.")] = 0.08,
    shards: Annotated[int, typer.Option(help="Over how many files the weights are spread.")] = 1,
    vocab: Annotated[int | None, typer.Option(help="Tokens in the vocabulary; by default what the text fills.")] = None,
    context: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 2048,
    tied: Annotated[
        bool | None, typer.Option("--tied/--untied", help="Share input and output embeddings; by default as usual.")
    ] = None,
    pooling: Annotated[
        str, typer.Option(help="Of encoders: mean, cls, lasttoken, max, mean_sqrt_len_tokens, weightedmean or none.")
    ] = "mean",
    as_json: Annotated[bool, typer.Option("--json", help="Say what was made as one JSON object.")] = False,
) -> None:
    """Make a small model with random weights, in Hugging Face layout, with a tokenizer of its own.

    Example: longshore model sample /tmp/harbour --arch qwen3 --size 60M --seed 7 --shards 3
    """
    from models.errors import ModelError
    from models.sample import make_sample
    from models.sample_encoder import ENCODER_ARCHITECTURES, make_encoder_sample

    try:
        made = (
            make_encoder_sample(
                directory,
                arch=arch,
                parameters=parse_size(size),
                seed=seed,
                dtype=dtype,
                std=std,
                vocabulary=vocab,
                context=min(context, 512),
                pooling=None if pooling == "none" else pooling,
            )
            if arch in ENCODER_ARCHITECTURES
            else make_sample(
                directory,
                arch=arch,
                parameters=parse_size(size),
                seed=seed,
                dtype=dtype,
                std=std,
                shards=shards,
                vocabulary=vocab,
                context=context,
                tied=tied,
            )
        )
    except ModelError as error:
        raise UserError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(asdict(made) | {"directory": str(made.directory)}))
        return
    typer.echo(
        f"{made.directory}: {made.architecture}, {made.parameters / 1e6:.1f}M parameters in {made.layers} layers of "
        f"{made.hidden}, {made.dtype}, {made.vocabulary} tokens, context {made.context}, "
        f"{'tied' if made.tied else 'untied'} embeddings, {made.weight_bytes / 1e6:.0f} MB in {made.shards} "
        f"file{'s' if made.shards > 1 else ''}."
    )


def bench_engine(
    size: Annotated[str, typer.Option(help="About how many parameters the sample has.")] = "60M",
    arch: Annotated[str, typer.Option(help="Architectures of the samples, with commas.")] = "llama,qwen3,gpt2",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads to compute with; 0 leaves the choice to torch.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller sample and fewer rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Tokens per second of the engine beside `generate`, and where the time of a step goes.

    Example: longshore bench engine --arch llama,mixtral --quick --json
    """
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from models.bench_engine import measure, tables
    from models.errors import ModelError

    if threads:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        figures = [
            measure(
                arch=name.strip(),
                parameters=min(parse_size(size), 8_000_000) if quick else parse_size(size),
                dtype=dtype,
                device=device,
                rounds=3 if quick else 5,
                answer_tokens=24 if quick else 48,
                steps=12 if quick else 24,
                progress=lambda doing: typer.echo(doing, err=True),
            )
            for name in arch.split(",")
        ]
    except ModelError as error:
        raise UserError(str(error)) from error
    if as_json:
        typer.echo(json.dumps({"models": [each.to_dict() for each in figures]}))
        return
    console = Console()
    for each in figures:
        for table in tables(each):
            console.print(table)
