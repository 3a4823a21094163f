"""A Hugging Face directory before it is packed: everything that can be wrong with it, found without reading its
weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from loaders.errors import CheckpointError, enumerate_some, quote
from loaders.header import TensorRecord, read_header
from loaders.layout import PADDING_PREFIX
from loaders.manifest import COMPANION_LIMIT_BYTES
from loaders.packed import WEIGHTS_NAME
from loaders.pickled import read_pickled
from loaders.reading import looking_at, read_bounded, require_directory, require_plain_name

CONFIG_LIMIT_BYTES = 16 << 20
INDEX_LIMIT_BYTES = 128 << 20
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"

# Any one of these is enough to make a tokenizer from.
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
)
OTHER_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What makes a vector of a sequence, in the layout of sentence-transformers; each module has a folder of its own.
EMBEDDING_NAMES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
MODULES_LIMIT = 16


@dataclass(frozen=True, slots=True)
class SourceCheckpoint:
    """A directory whose weights are all there, as far as headers and sizes tell."""

    directory: Path
    config: Mapping[str, Any]
    tensors: tuple[TensorRecord, ...]
    """The tensors of all shards, sorted by name; offsets are within their shard. Padding of a packed source is left
    out.
    """
    pickled: bool = False
    """The weights are `.bin` files of PyTorch and not safetensors."""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(record.end - record.begin for record in self.tensors)

    @property
    def main_dtype(self) -> str:
        """The dtype, as safetensors names it, that most bytes have."""
        sizes: dict[str, int] = {}
        for record in self.tensors:
            sizes[record.dtype] = sizes.get(record.dtype, 0) + record.end - record.begin
        return max(sizes, key=lambda dtype: (sizes[dtype], dtype))


def inspect_source(directory: Path, *, tokenizer: bool = True) -> SourceCheckpoint:
    """Checks directory, config.json, tokenizer (unless nobody will need it) and every shard's header and size; one
    CheckpointError per kind of trouble.
    """
    with looking_at(directory):
        return _inspect(directory, tokenizer=tokenizer)


def _inspect(directory: Path, *, tokenizer: bool) -> SourceCheckpoint:
    require_directory(directory)
    config_path = directory / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint")
    config = _read_object(config_path, CONFIG_LIMIT_BYTES)
    tensors: list[TensorRecord] = []
    shards, pickled = shards_of(directory)
    for path, expected in shards:
        records = read_pickled(path) if pickled else read_header(path).tensors
        check_shard(path, expected, records)
        tensors += [record for record in records if not record.name.startswith(PADDING_PREFIX)]
    check_names(directory, [record.name for record in tensors])
    if not any(record.end > record.begin for record in tensors):
        raise CheckpointError(f"{directory}: its weights are empty; download it again")
    found = any((directory / name).exists() for name in TOKENIZER_NAMES) or any(directory.glob("*.tiktoken"))
    if tokenizer and not found:
        raise CheckpointError(
            f"{directory} has no tokenizer (such as tokenizer.json); copy it there from the model's source"
        )
    return SourceCheckpoint(directory, config, tuple(sorted(tensors, key=lambda record: record.name)), pickled)


def check_shard(path: Path, expected: Set[str], records: Iterable[TensorRecord]) -> None:
    """That the shard at `path`, which holds `records`, has every tensor that the index expects in it."""
    missing = sorted(expected - {record.name for record in records})
    if missing:
        raise CheckpointError(f"{path} lacks {enumerate_some(missing)}, which the index says it holds; get it again")


def check_names(directory: Path, names: Iterable[str]) -> None:
    """That no tensor stands in two shards: readers disagree which one counts."""
    for first, second in pairwise(sorted(names)):
        if first == second:
            raise CheckpointError(f"{directory}: tensor {quote(first)} stands in two shards; download it again")


def read_companions(directory: Path) -> dict[str, bytes]:
    """Configuration, tokenizer and chat template, by name: what is copied beside the packed weights."""
    tiktoken = (path.name for path in directory.glob("*.tiktoken"))
    modules = (f"{path.name}/config.json" for path in sorted(directory.glob("[0-9]_*"))[:MODULES_LIMIT])
    names = sorted({*OTHER_NAMES, *TOKENIZER_NAMES, *EMBEDDING_NAMES, *tiktoken, *modules})
    with looking_at(directory):
        present = [name for name in names if (directory / name).exists()]
    return {name: read_bounded(directory / name, COMPANION_LIMIT_BYTES) for name in present}


def shards_of(directory: Path) -> tuple[list[tuple[Path, set[str]]], bool]:
    """Every file with weights, and the tensors that the index expects in it (none is expected without an index); and
    whether these are pickles. Safetensors are preferred where both are there.
    """
    for single, index, pickled in (
        (WEIGHTS_NAME, INDEX_NAME, False),
        (PICKLED_NAME, PICKLED_INDEX_NAME, True),
    ):
        if (directory / single).exists():
            return [(directory / single, set())], pickled
        if (directory / index).exists():
            return _indexed(directory, directory / index), pickled
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.gguf") for path in directory.glob(pattern))
    hint = f"; {quote(others[0])} is not read, convert it to safetensors first" if others else ""
    raise CheckpointError(f"{directory} has no weights ({WEIGHTS_NAME}, {INDEX_NAME} or {PICKLED_NAME}){hint}")


def _indexed(directory: Path, index_path: Path) -> list[tuple[Path, set[str]]]:
    """The shards that an index names, all of them there."""
    weight_map = _read_object(index_path, INDEX_LIMIT_BYTES).get("weight_map")
    if type(weight_map) is not dict or not weight_map or not all(type(name) is str for name in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map from tensors to files; download it again")
    expected: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        expected.setdefault(require_plain_name(name, str(index_path)), set()).add(tensor)
    for name in sorted(expected):
        if not (directory / name).exists():
            raise CheckpointError(
                f"{directory} lacks the shard {quote(name)} that {index_path.name} names; download it again"
            )
    return [(directory / name, expected[name]) for name in sorted(expected)]


def _read_object(path: Path, limit: int) -> dict[str, Any]:
    content = read_bounded(path, limit)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if type(document) is not dict:
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return document
