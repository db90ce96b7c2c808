"""Killable verifier processes: the parent's side.

One thread per scorer. The thread has its scorer forked (see `verifier_server.py`), takes jobs (a few responses to one problem) from a
queue that all threads share, and waits for the verdicts, with a deadline for each response. A scorer that is over the deadline is
killed, one that died is noticed by end of file; either way the response it was scoring gets a wrong verdict, those without one go
back to the queue, and the thread has another one forked. Threads rather than asyncio keep this independent of the caller's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from dapo_megatron.config.schema import RewardConfig
from dapo_megatron.rewards.messages import ScoreRequest
from dapo_megatron.rewards.verifier_server import Scorer, VerdictMissing, VerifierServer
from dapo_megatron.types import RewardError, Score

_RESPONSES_PER_JOB = 16


class RewardWorkers:
    """A pool of `reward.num_workers` scorers, shared by any number of concurrent `score` calls.

    They start with the constructor; `wait_ready` waits for them. Once one of them cannot be started, or after `close`, every call
    raises RewardError.
    """

    def __init__(self, config: RewardConfig):
        self._config = config
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._server = VerifierServer(config)
        self._scorers: set[Scorer] = set()
        self._stopped_by: Exception | None = None
        self._ready = [Future[None]() for _ in range(config.num_workers)]
        self._threads = [
            threading.Thread(target=self._run, args=(ready,), name=f"reward-worker-{number}", daemon=True)
            for number, ready in enumerate(self._ready)
        ]
        for thread in self._threads:
            thread.start()

    async def wait_ready(self) -> None:
        """Return when every scorer is up. Raises RewardError when one cannot, such as for a wrong reward.function."""
        await asyncio.gather(*map(asyncio.wrap_future, self._ready))

    async def score(self, responses: Sequence[str], answer: str) -> tuple[Score, ...]:
        """Verdicts on responses to one problem, in the order of the responses.

        Only the last `reward.max_response_chars` characters of each are looked at. A verdict that takes longer than
        `reward.timeout_seconds`, or that ends its process, is wrong with `error` set. Raises RewardError when the
        workers cannot be started or are closed.
        """
        tails = [response[-self._config.max_response_chars :] for response in responses]
        jobs = [_Job(batch, answer) for batch in itertools.batched(tails, _RESPONSES_PER_JOB)]
        for job in jobs:
            self._submit(job)
        batches = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        return tuple(itertools.chain.from_iterable(batches))

    def close(self) -> None:
        """Kill the processes and end the threads; pending `score` calls raise RewardError. Closing twice is harmless."""
        self._stop(RewardError("The reward workers are closed; make new RewardWorkers to score on."))
        for thread in self._threads:
            thread.join()
        self._server.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, job: _Job) -> None:
        with self._lock:
            if self._stopped_by is None:
                self._jobs.put(job)
                return
        job.fail(self._stopped_by)

    def _stop(self, reason: Exception) -> None:
        """Fail what waits and wake every thread; the first reason stays."""
        with self._lock:
            if self._stopped_by is not None:
                return
            self._stopped_by = reason
            for scorer in self._scorers:
                scorer.kill()
            self._server.kill()
            waiting = self._empty_queue()
            for _ in self._threads:
                self._jobs.put(None)
        for job in waiting:
            job.fail(reason)
        for ready in self._ready:
            _fail(ready, reason)

    def _empty_queue(self) -> list[_Job]:
        jobs: list[_Job] = []
        with contextlib.suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                jobs.append(job)
        return jobs

    def _run(self, ready: Future[None]) -> None:
        """Body of a thread: one scorer at a time, fed from the queue."""
        job = None
        try:
            scorer = self._start_scorer()
            _resolve(ready, None)
            while (job := self._jobs.get()) is not None:
                if not self._score(scorer, job):
                    self._retire(scorer)
                    scorer = self._start_scorer()
            self._retire(scorer)
        except Exception as error:  # noqa: BLE001 - whatever ends a thread must reach those who wait, else they wait for ever
            self._stop(error)
            if job is not None:
                job.fail(error)

    def _score(self, scorer: Scorer, job: _Job) -> bool:
        """Score what is left of a job; False when that took the scorer, in which case the rest is back in the queue."""
        if job.future.cancelled():
            return True
        places, num_scored, spent = job.missing, 0, False
        try:
            scorer.send(ScoreRequest(tuple(job.responses[place] for place in places), job.answer))
            while num_scored < len(places) and not spent:
                reply = scorer.receive(self._config.timeout_seconds)
                for score in reply.scores:
                    job.scores[places[num_scored]] = score
                    num_scored += 1
                spent = reply.spent
        except VerdictMissing as missing:
            at = max(num_scored, scorer.place)  # one that has replied may not have gone on yet
            reason = str(missing) if missing.late else f"the verifier process ended with code {self._retire(scorer)}"
            job.scores[places[at]] = Score(self._config.wrong_reward, correct=False, error=reason)
            spent = True
        if job.missing and self._stopped_by is not None:
            job.fail(self._stopped_by)
        elif job.missing:
            self._submit(job)
        else:
            job.finish()
        return not spent

    def _start_scorer(self) -> Scorer:
        scorer = self._server.start_scorer()
        with self._lock:
            self._scorers.add(scorer)
            stopped_by = self._stopped_by
        if stopped_by is not None:
            self._retire(scorer)
            raise stopped_by
        return scorer

    def _retire(self, scorer: Scorer) -> int | None:
        """End a scorer; its exit code, None when it had been ended before."""
        with self._lock:
            if scorer not in self._scorers:
                return None
            self._scorers.remove(scorer)
            scorer.kill()  # here, not by the server alone: `close` may end that first
        return self._server.end_scorer(scorer)


@dataclass(slots=True, eq=False)
class _Job:
    """Some responses to one problem, and the verdicts so far by the place of the response."""

    responses: tuple[str, ...]
    answer: str
    scores: dict[int, Score] = field(default_factory=dict)
    future: Future[list[Score]] = field(default_factory=Future)

    @property
    def missing(self) -> list[int]:
        return [place for place in range(len(self.responses)) if place not in self.scores]

    def finish(self) -> None:
        _resolve(self.future, [self.scores[place] for place in range(len(self.responses))])

    def fail(self, error: Exception) -> None:
        _fail(self.future, error)


def _resolve[T](future: Future[T], result: T) -> None:
    with contextlib.suppress(InvalidStateError):  # the waiting task was cancelled
        future.set_result(result)


def _fail[T](future: Future[T], error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # done already, or the waiting task was cancelled
        future.set_exception(error)
