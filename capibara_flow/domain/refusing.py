"""What a worker answers that would not do what it was asked, as an error of whoever asked. Pure."""

from capibara_flow.errors import CapibaraError
from topics.message import Refusal


class Refused(CapibaraError):
    """A worker would not do what it was asked, for what its *refusal* says: its status and whether asking again may help among it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal
