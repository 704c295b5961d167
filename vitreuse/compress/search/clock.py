"""When time is up, for work that goes on as long as it is given."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vitreuse.io.progress import WorkProgress


@dataclass
class Clock:
    """Says when time is up, and shows how much of it is gone.

    Attributes:
        deadline: On the monotonic clock.
        progress: Of as many seconds as there are.
        said: What stands beside the rate.
    """

    deadline: float
    progress: WorkProgress
    said: str = ""

    def is_over(self, used_before: float = 0.0) -> bool:
        """Whether the deadline is past, or would be had the seconds that an earlier start used been used now."""
        left = self.deadline - time.monotonic() - used_before
        self.progress.reach(min(self.progress.total, round(self.progress.total - left)), self.said)
        return left <= 0
