"""Why a server takes no request now."""

from holdfast.errors import HoldfastError


class Busy(HoldfastError):
    """Too many wait already; `retry_after` says in how many seconds to come back."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Stopped(HoldfastError):
    """The engine ends, or has ended."""
