"""How large a prompt in parts may be, and for how long its parts are kept."""

from __future__ import annotations

PART_LIMIT_BYTES = 512 * 1024
"""One part; a NATS server takes 1 MB by default."""
PARTS_LIMIT = 64
"""Parts of one prompt."""
UPLOAD_LIMIT_BYTES = 8 * 1024 * 1024
"""All parts of one prompt together."""
PARTS_KEPT = 16_384
"""Parts of all prompts of a cell at a time."""
PARTS_SECONDS = 2 * 3600
"""So long a part is kept. A request that cites parts has ended before they go."""
