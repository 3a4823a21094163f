"""Sizes as people write them."""

from __future__ import annotations

import re

from bus.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]I?)?B?\s*\Z", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Bytes, from texts such as 500MB, 2GB, 1.5GiB. Raises `UserError` that names the option."""
    match = _SIZE.match(text)
    if match is None:
        raise UserError(f"{option} {text!r} is no size: write a number with a unit, such as 500MB or 2GiB")
    size = int(float(match.group(1)) * _UNITS[(match.group(2) or "").upper()])
    if size < 1:
        raise UserError(f"{option} must be at least one byte, got {text!r}")
    return size


def show_size(size: float) -> str:
    """Three digits and a unit: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
