"""What a person at the terminal did or met, told in one sentence: no stack trace belongs to it."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right; the message is one sentence that says what, where and what to do.

    `longshore` prints it to stderr and ends with `exit_code`.
    """

    exit_code = 2
