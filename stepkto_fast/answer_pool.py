"""A pool of processes that check answers: none can hang, crash or eat the memory of the run.

One thread of the caller, any thread, feeds all of them over pipes and reads their replies as they come. A process has
several requests at once but answers in order, so when it dies or falls silent, the first one without a reply is to
blame: that one stays open, the others go to another process. Each process limits itself in time and memory (see
`answer_worker`); the pool kills the ones that do not. They end when the pipe from here does, whatever ended it.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from .errors import RunError

MODULE = "stepkto_fast.answer_worker"
INSTALL = "pip install 'math-verify[antlr4-13-2]==0.9.0'"
MEMORY_BYTES = 1 << 30  # address space of one process
GRACE_SECONDS = 1.0  # beyond the process's own limit, before it is killed
START_SECONDS = 120.0  # to import sympy on a busy machine
START_ATTEMPTS = 3
REQUESTS_AT_ONCE = 32

Request = tuple[str, ...]


class Worker:
    """One process, the numbers of the requests it has yet to answer, and when the next reply is due."""

    def __init__(self, timeout: float, memory: int):
        self.timeout = timeout
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE, str(timeout), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},  # sympy orders by hash in places
        )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        self.ready = False
        self.spent = False  # it left a request open for lack of memory, and takes no more
        self.due = time.monotonic() + START_SECONDS
        self.asked: deque[int] = deque()
        self.unsent, self.unread = b"", b""

    @property
    def busy(self) -> bool:
        return bool(self.asked) or not self.ready

    def ask(self, numbers: Iterable[int], requests: Sequence[Request]) -> None:
        for number in numbers:
            self.asked.append(number)
            self.unsent += json.dumps(requests[number]).encode() + b"\n"
        self.due = time.monotonic() + self.timeout + GRACE_SECONDS
        self.send()

    def send(self) -> None:
        try:
            self.unsent = self.unsent[os.write(self.stdin, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.unsent = b""  # it is dead, as reading will tell

    def receive(self) -> list | None:
        """The replies that wait in the pipe, at least a part of one; None when there will be no more."""
        data = os.read(self.stdout, 1 << 16)
        *lines, self.unread = (self.unread + data).split(b"\n")
        self.due = time.monotonic() + self.timeout + GRACE_SECONDS
        return [json.loads(line) for line in lines] if data else None

    def end(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        self.process.wait()


class WorkerPool:
    """`workers` processes, each with `timeout` seconds for a request and `memory` bytes of address space.

    `run` may be called from any thread, by one at a time.
    """

    def __init__(self, workers: int, timeout: float, memory: int = MEMORY_BYTES):
        self.timeout, self.memory = timeout, memory
        self.failed_starts = 0
        self.workers = [Worker(timeout, memory) for _ in range(workers)]

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []

    def run(self, requests: Sequence[Request], on_progress: Callable[[int], None] | None = None) -> list[bool | None]:
        """Each request's reply; None where its process crashed or ran out of time or memory.

        on_progress gets how many requests are done. Raises RunError where the processes do not even start.
        """
        if not self.workers:
            raise ValueError("this pool is closed")
        replies: dict[int, bool | None] = {}
        waiting = deque(range(len(requests)))
        try:
            while len(replies) < len(requests):
                self._feed(waiting, requests)
                readable, before = self._wait(), len(replies)
                for place, worker in enumerate(self.workers):
                    if worker in readable or (worker.busy and time.monotonic() > worker.due):
                        alive = worker in readable and self._take(worker, replies)
                        if not alive:
                            self._bury(place, waiting, replies)
                if on_progress and len(replies) > before:
                    on_progress(len(replies))
        except BaseException:
            for place in range(len(self.workers)):  # replies that nobody waits for must not meet the next call
                self._replace(place)
            raise
        return [replies[n] for n in range(len(requests))]

    def _feed(self, waiting: deque[int], requests: Sequence[Request]) -> None:
        for place, worker in enumerate(self.workers):
            if waiting and worker.ready and not worker.asked:
                if worker.process.poll() is not None:  # died while idle: no request is to blame
                    self._replace(place)
                    continue
                share = -(-len(waiting) // (2 * len(self.workers)))  # the last ones must not all wait for one process
                worker.ask([waiting.popleft() for _ in range(min(share, REQUESTS_AT_ONCE))], requests)

    def _wait(self) -> set[Worker]:
        """The workers that can be read from, after the first of them can or is overdue; writes what they take."""
        with selectors.PollSelector() as selector:
            for worker in self.workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            due = min(worker.due for worker in self.workers if worker.busy)
            events = selector.select(max(0.0, due - time.monotonic()) + 0.001)
        for key, event in events:
            if event & selectors.EVENT_WRITE:
                key.data.send()
        return {key.data for key, event in events if event & selectors.EVENT_READ}

    def _take(self, worker: Worker, replies: dict[int, bool | None]) -> bool:
        """Files what `worker` replied; False where it is of no more use."""
        received = worker.receive()
        for reply in received or []:
            if worker.ready:
                replies[worker.asked.popleft()] = reply
                worker.spent = reply is None
            elif reply is not True:
                raise RunError(f"checking mathematical answers needs math-verify ({reply}): {INSTALL}")
            else:
                worker.ready, self.failed_starts = True, 0
        return received is not None and not worker.spent

    def _bury(self, place: int, waiting: deque[int], replies: dict[int, bool | None]) -> None:
        """A new process in the place of one that crashed, hangs or has no memory left."""
        worker = self.workers[place]
        if worker.asked and not worker.spent:
            replies[worker.asked.popleft()] = None
        waiting.extendleft(reversed(worker.asked))
        if not worker.ready:
            self.failed_starts += 1
        self._replace(place)
        if self.failed_starts == START_ATTEMPTS:
            self.failed_starts = 0
            raise RunError(
                f"the processes that check answers ended {START_ATTEMPTS} times before they were ready: "
                f"`{sys.executable} -m {MODULE} {self.timeout} {self.memory}` shows why"
            )

    def _replace(self, place: int) -> None:
        self.workers[place].end()
        self.workers[place] = Worker(self.timeout, self.memory)
