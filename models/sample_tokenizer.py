"""The tokenizer of sample models: byte-level BPE trained on the text that ships with this package."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|end|>", "<|begin|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
EOS, BOS, PAD = 0, 1, 2
SMALLEST_VOCABULARY = 256 + len(SPECIAL)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(text: str, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocabulary` tokens, all 256 bytes among them, so that any text can be said.

    Beyond what the text itself gives, compounds of its words fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(text, vocabulary), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[EOS],
        bos_token=SPECIAL[BOS],
        pad_token=SPECIAL[PAD],
        extra_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _lines(text: str, vocabulary: int) -> Iterator[str]:
    yield from text.splitlines()
    words = sorted({word.strip(".,:;?\"'").lower() for word in text.split()} - {""})
    wanted = max(0, vocabulary - len(words))
    for index in range(wanted):
        yield f" {words[index % len(words)]}{words[(index // len(words) + index * 7 + 1) % len(words)]}"
