"""Hands pytest-benchmark the durations that the stop-watch took.

pytest-benchmark times one test after the other, so that whatever a machine does in the meantime (a clock that drops, a
neighbour that wakes up) falls on one provider alone. Here the providers of a group take turns instead, and the whole
group is measured when its first test runs. A test then only reports: this is its timer, and every round "takes" what
was measured. The statistics, the tables, the JSON and `--benchmark-compare` stay pytest-benchmark's.
"""

from collections import deque


class Replay:
    """A timer whose readings, in pairs of start and stop, lie as far apart as the durations that were loaded."""

    def __init__(self) -> None:
        self.now = 0.0
        self.running = False
        self.left: deque[float] = deque()

    def load(self, seconds: list[float]) -> None:
        self.left, self.running = deque(seconds), False

    def __call__(self) -> float:
        if self.running:
            self.now += self.left.popleft()
        self.running = not self.running
        return self.now


replay = Replay()
