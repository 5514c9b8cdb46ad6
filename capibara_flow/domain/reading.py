"""Reading a turn's output once and in order, from a feed that may repeat, drop and jump."""

from enum import Enum


class Verdict(Enum):
    """What to do with a message of the live feed."""

    DELIVER = "deliver"
    DUPLICATE = "duplicate"
    GAP = "gap"


class Cursor:
    """Where a reader is: *last* is the sequence of the last message delivered.

    A live message tells its own stream sequence and the sequence of its predecessor on the same subject
    (``Nats-Sequence`` and ``Nats-Last-Sequence`` of a republished message), so a loss shows at once.
    """

    def __init__(self, after: int = 0) -> None:
        self.last = after

    def judge(self, sequence: int, previous: int) -> Verdict:
        """What to do with the live message *sequence* whose predecessor is *previous*; moves on when it is to be delivered."""
        if sequence <= self.last:
            return Verdict.DUPLICATE
        if previous > self.last:
            return Verdict.GAP
        self.last = sequence
        return Verdict.DELIVER

    def stored(self, sequence: int) -> bool:
        """Whether the message *sequence*, read from the stream in order, is new; moves on when it is."""
        if sequence <= self.last:
            return False
        self.last = sequence
        return True
