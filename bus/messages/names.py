"""Names of models as one token: of subjects, of directories, of addresses."""

from __future__ import annotations

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def escape_model(model: str) -> str:
    """A model's name as one subject token: every byte but letters, digits, `-` and `_` becomes `=` and two hex digits.

    >>> escape_model("meta/Llama-3.1")
    'meta=2FLlama-3=2E1'
    """
    return "".join(c if c in _PLAIN else "".join(f"={b:02X}" for b in c.encode()) for c in model)


def unescape_model(token: str) -> str:
    """The inverse of `escape_model`. Raises ValueError where the token is not one that it makes."""
    data = bytearray()
    i = 0
    while i < len(token):
        if token[i] == "=":
            data.append(int(token[i + 1 : i + 3], 16))
            i += 3
        else:
            data += token[i].encode()
            i += 1
    model = data.decode()
    if escape_model(model) != token:
        raise ValueError(f"{token!r} is not an escaped model name")
    return model
