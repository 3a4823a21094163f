"""A model that is ready to answer: weights in place, engine, tokenizer, defaults."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)

from models.architecture import (
    DEFAULT_CONTEXT_AT_MOST,
    Architecture,
    choose_experts,
    describe,
    describe_encoder,
)
from models.contract import Engine, Sampling
from models.detokenizer import Decode
from models.embedding import Embedder, EmbeddingEngine, pad_of
from models.engine import DEFAULT_PREFILL_CHUNK, SlotEngine
from models.errors import ModelError
from models.pooling import Pooling, read_pooling
from models.skeleton import Skeleton, assemble

DEFAULT_MAX_TOKENS = 256
BEGINNING_CHARACTERS = 16
"""So many characters for each token of the context are looked at first: in few texts do tokens get half as long."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where a request says nothing, and the tokens that end an answer."""

    sampling: Sampling
    eos: tuple[int, ...]


class Instance:
    """One loaded model. `engine` belongs to one thread; encoding may run in another."""

    def __init__(
        self, engine: Engine, tokenizer: Any, defaults: Defaults, name: str, skeleton: Skeleton | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._name = name
        self._skeleton = skeleton

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the tokenizer puts around it; ModelError."""
        self._check_length(text)
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        return tokens

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of a conversation by the model's chat template, up to where the answer begins; ModelError."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(f"Model {self._name} has no chat template: send a plain prompt instead of messages.")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of others: they raise what they like
            raise ModelError(f"The chat template of {self._name} refuses these messages: {error}.") from error
        self._check_length(text)
        # The template writes the special tokens itself.
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def encode_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts to embed, each with the special tokens that the tokenizer puts around it; ModelError."""
        for text in texts:
            self._check_length(text)
        tokens: list[list[int]] = self.tokenizer(list(texts))["input_ids"] if texts else []
        return tokens

    def _check_length(self, text: str) -> None:
        """Raise ModelError where the beginning of a text alone has twice the tokens of the context: tokenizing a text
        of several MB takes seconds, and others wait for the tokenizer. How a text is cut moves few tokens at the cut.
        """
        context = self.engine.context
        if len(text) <= BEGINNING_CHARACTERS * context:
            return
        found = len(self.tokenizer(text[: BEGINNING_CHARACTERS * context], add_special_tokens=False)["input_ids"])
        if found >= 2 * context:
            raise ModelError(
                f"The text has more than {2 * context} tokens, the context of {self._name} is {context}: shorten it."
            )

    def close(self) -> None:
        """Let go of weights and cache; the instance is of no use afterwards.

        The weights are gone when this returns, whoever still refers to the engine: a store counts on their memory.
        """
        if self._skeleton is not None:
            self._skeleton.empty()
        del self.engine
        gc.collect()  # modules refer to each other in circles; their memory is wanted now


def load_instance(
    directory: Path,
    tensors: Mapping[str, torch.Tensor] | None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    kv_bytes: int,
    max_slots: int = 16,
    context: int | None = None,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    encoder: bool = False,
    prepared: Prepared | None = None,
) -> Instance:
    """The model of a directory in Hugging Face layout, its weights being `tensors`.

    `tensors` are parameters and persistent buffers by the module's own names; they are not copied unless `dtype` or
    `device` asks for others. None reads the weights from the directory. `context` (tokens) is the model's own, and at
    most 4,096, where it is None. With `encoder` it is a model without a language-model head, which makes embeddings
    only. `prepared` was made of the same checkpoint, device and kind. Raises ModelError for everything that is wrong
    with directory, weights or sizes.
    """
    if prepared is None:
        prepared = prepare(directory, tensors, device=device, dtype=dtype, encoder=encoder)
    elif prepared.skeleton is not None and tensors is not None:
        prepared.skeleton.fill(tensors, torch.device(device))
    return _instance(prepared, kv_bytes, max_slots, context, prefill_chunk)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of a model but room for its sequences: read, built and checked. One instance can be made of it.

    `skeleton` None: its weights were read by transformers, and stay. `architecture` None: it is an encoder.
    """

    directory: Path
    model: Any
    skeleton: Skeleton | None
    architecture: Architecture | None
    tokenizer: Any
    defaults: Defaults
    pooling: Pooling


def prepare(
    directory: Path,
    tensors: Mapping[str, torch.Tensor] | None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    encoder: bool = False,
) -> Prepared:
    """All that can be done before a model is wanted; arguments and errors as of `load_instance`.

    With `skeleton.empty()` afterwards it refers to no weights; `load_instance` fills it.
    """
    model, skeleton = _model(directory, tensors, device=device, dtype=dtype, encoder=encoder)
    architecture = None if encoder else describe(model)
    tokenizer = _tokenizer(directory)
    if encoder:
        describe_encoder(model)
        defaults = Defaults(Sampling(max_tokens=DEFAULT_MAX_TOKENS), ())
    else:
        defaults = _defaults(directory, model.config, tokenizer)
    pooling = read_pooling(directory, model.config, encoder=encoder)
    return Prepared(directory, model, skeleton, architecture, tokenizer, defaults, pooling)


def _instance(prepared: Prepared, kv_bytes: int, max_slots: int, context: int | None, prefill_chunk: int) -> Instance:
    model, tokenizer, name = prepared.model, prepared.tokenizer, prepared.directory.name
    if prepared.architecture is None:
        # Tokenizers without a bound of their own state an enormous one. Whoever gives a context may not know of these.
        longest = min(describe_encoder(model), int(tokenizer.model_max_length), context or DEFAULT_CONTEXT_AT_MOST)
        embedder = Embedder(model, prepared.pooling, pad=pad_of(model), context=longest)
        alone = EmbeddingEngine(embedder, name=name, slots=max_slots)
        return Instance(alone, tokenizer, prepared.defaults, name, prepared.skeleton)
    architecture = prepared.architecture
    longest = min(architecture.context, DEFAULT_CONTEXT_AT_MOST) if context is None else context
    if not 2 <= longest <= architecture.context:
        raise ModelError(
            f"The context asked for is {longest} tokens and {name} can be run at 2 to {architecture.context}."
        )
    engine = SlotEngine(
        model,
        architecture,
        text_decoder(tokenizer),
        eos=prepared.defaults.eos,
        kv_bytes=kv_bytes,
        context=longest,
        max_slots=max_slots,
        prefill_chunk=prefill_chunk,
    )
    embedder = Embedder(_without_head(model), prepared.pooling, pad=pad_of(model), context=longest)
    return Instance(EmbeddingEngine(embedder, engine), tokenizer, prepared.defaults, name, prepared.skeleton)


def _without_head(model: Any) -> Any:
    """The part of a causal language model that gives the hidden states behind its last norm."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder is not None and decoder is not model else model.base_model


def load_model(
    directory: Path,
    tensors: Mapping[str, torch.Tensor] | None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    encoder: bool = False,
) -> Any:
    """The model alone; arguments and errors as of `load_instance`."""
    return _model(directory, tensors, device=device, dtype=dtype, encoder=encoder)[0]


def _model(
    directory: Path,
    tensors: Mapping[str, torch.Tensor] | None,
    *,
    device: str,
    dtype: str | None,
    encoder: bool,
) -> tuple[Any, Skeleton | None]:
    config = _config(directory)
    wanted = _dtype(dtype)
    skeleton = None
    if tensors is None:
        model = _read(directory, config, wanted, torch.device(device), encoder=encoder)
    else:
        if wanted is not None:
            tensors = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
        skeleton = assemble(config, tensors, torch.device(device), encoder=encoder)
        model = skeleton.model
    choose_experts(model)
    return model, skeleton


def load_decode(directory: Path) -> Decode:
    """The text of tokens, by the tokenizer of this directory; ModelError."""
    return text_decoder(_tokenizer(directory))


def text_decoder(tokenizer: Any) -> Decode:
    """The text of tokens, special ones left out."""

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    return decode


def _config(directory: Path) -> PretrainedConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json: give a model directory in Hugging Face layout.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
        return config
    except (ValueError, OSError, KeyError) as error:
        kind = _model_type(path)
        if kind is None:
            raise ModelError(f"{path} is not a model configuration: {_first_line(error)}") from error
        raise ModelError(f"transformers does not know the architecture {kind!r} of {directory}.") from error


def _model_type(path: Path) -> str | None:
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{name!r} is not a number type for weights: use float32, bfloat16, float16 or float64.")
    return found


def _read(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype | None, device: torch.device, *, encoder: bool
) -> Any:
    builder: Any = AutoModel if encoder else AutoModelForCausalLM
    try:
        model: Any = builder.from_pretrained(directory, config=config, dtype=dtype or "auto", local_files_only=True)
    except Exception as error:  # safetensors, pickle and transformers raise many kinds
        raise ModelError(f"The weights of {directory} cannot be read: {_first_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def _tokenizer(directory: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers, json and transformers raise many kinds
        raise ModelError(f"The tokenizer of {directory} cannot be read: {_first_line(error)}") from error


def _defaults(directory: Path, config: PretrainedConfig, tokenizer: Any) -> Defaults:
    try:
        generation = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id
    if eos is None:
        eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    found = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    temperature = generation.temperature if generation.temperature is not None else 1.0
    sampling = Sampling(
        max_tokens=generation.max_new_tokens or DEFAULT_MAX_TOKENS,
        temperature=float(temperature) if generation.do_sample else 0.0,
        top_p=float(generation.top_p) if generation.top_p is not None else 1.0,
        top_k=int(generation.top_k) if generation.top_k is not None else 0,
    )
    return Defaults(sampling, found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
