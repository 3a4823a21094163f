"""A reader that comes between `sequence.resume` and the step in which the sequence goes on is shown it from there.

Told that it is not there, the cell would order the same at once, as often as messages can travel.
"""

from __future__ import annotations

from actors.worker_following import FollowedSequence, Followers
from bus.messages import AddReader, FollowSequence, ReplyTo, ResumeSequence


def followers(followed: FollowedSequence) -> Followers:
    made = Followers.__new__(Followers)
    made._followed = {followed.key: followed}
    return made


def test_it_is_found_once_it_is_to_go_on_here_and_shown_once() -> None:
    followed = FollowedSequence(FollowSequence("r", 4, "m", 1, "gpu/s2/0", 177, 3), 16)
    followed.start = object()  # type: ignore[assignment]
    here = followers(followed)
    late = ReplyTo("_INBOX.late", 4)
    assert not here.add_reader(AddReader("r", 4, late), 64), "followed only: it runs elsewhere"
    followed.resume = 25, ResumeSequence("r", 4, 7, (), (ReplyTo("_INBOX.first"), ReplyTo("_INBOX.late", 1)))
    assert here.add_reader(AddReader("r", 4, late), 64)
    assert not here.add_reader(AddReader("r", 3, late), 64) and not here.add_reader(AddReader("q", 4, late), 64)
    shown = [(reader.reply.subject, reader.next) for reader in followed.held(0.0).readers]
    assert shown == [("_INBOX.first", 0), ("_INBOX.late", 4)]
    assert here.add_reader(AddReader("r", 4, ReplyTo("_INBOX.third")), 2)
    assert [reader.reply.subject for reader in followed.held(0.0).readers] == ["_INBOX.late", "_INBOX.third"]
