"""The errors of this room."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used, or an operation on it that cannot be done.

    The text is one sentence for the person at the terminal: what is wrong, where (file, chunk, tensor), what to do.
    """


class NoRoom(CheckpointError):
    """Memory does not suffice now; nothing is wrong with the checkpoint."""


class DestinationBusy(CheckpointError):
    """Another process, or another thread, writes there now; afterwards it may be what is wanted."""


class DiskFull(CheckpointError):
    """What is to be written finds no room, wherever it comes from."""


def quote(name: str) -> str:
    """`name` from an untrusted file, printable on one line and at most about 80 characters long."""
    shown = name if len(name) <= 80 else name[:60] + "..." + name[-15:]
    return repr(shown)


def enumerate_some(names: list[str], limit: int = 3) -> str:
    """The first `limit` names, quoted, and how many more there are."""
    shown = ", ".join(quote(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def one_line(error: Exception) -> str:
    """What a library said, on one line and not endless."""
    text = " ".join("".join(one if one.isprintable() else " " for one in str(error)).split())
    return (text[:300] + "..." if len(text) > 300 else text) or type(error).__name__
