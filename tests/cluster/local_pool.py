"""A `WorkerPool` over objects of this process, whose workers can be killed, stopped and replaced while calls are under way."""

import asyncio
import inspect
from contextlib import asynccontextmanager

from sparsevila_cluster.core.errors import DeadlineExceeded, Internal, SparseVilaError, WorkerLost


class LocalPool:
    """`workers`: name -> object. `silence_s`: a stream that a stopped worker leaves hanging is lost after this long.

    calls: every (worker, method) that was asked for. before: called with (worker, method, args) ahead of every call; it may raise.
    """

    def __init__(self, workers, silence_s=0.5):
        self.workers = dict(workers)
        self.silence_s = silence_s
        self.calls = []
        self.before = None
        self._dead = {}
        self._stopped = set()

    def num(self, method, worker=None):
        return sum(asked == method and worker in (None, name) for name, asked in self.calls)

    def kill(self, worker):
        """Every call and stream that is under way there, and every later one, raises WorkerLost."""
        self.workers.pop(worker)
        self._stopped.discard(worker)
        if worker in self._dead:
            self._dead.pop(worker).set()

    def stop(self, worker):
        """As SIGSTOP: it does not answer any more."""
        self._stopped.add(worker)

    def go_on(self, worker):
        self._stopped.discard(worker)

    async def call(self, worker, method, *args, within_s):
        async with self._asked(worker, method, args) as (name, target, dead):
            work = asyncio.ensure_future(_result(getattr(target, method), args))
            try:
                return await self._first(work, dead, name, within_s, DeadlineExceeded(f"{method} took longer than {within_s} s"))
            finally:
                work.cancel()
                await asyncio.wait({work}, timeout=5)

    async def stream(self, worker, method, *args, within_s):
        until_s = asyncio.get_running_loop().time() + within_s
        async with self._asked(worker, method, args) as (name, target, dead):
            items = getattr(target, method)(*args)
            if not inspect.isasyncgen(items):
                items = _only(items)
            work = None
            try:
                while True:
                    left_s = until_s - asyncio.get_running_loop().time()
                    work = asyncio.ensure_future(anext(items, _END))
                    late = DeadlineExceeded(f"{method} took longer than {within_s} s")
                    item = await self._first(work, dead, name, left_s, late, self.silence_s)
                    if item is _END:
                        return
                    yield item
            finally:
                if work is not None:
                    work.cancel()
                    await asyncio.wait({work}, timeout=5)
                await items.aclose()

    @asynccontextmanager
    async def _asked(self, worker, method, args):
        name = worker if worker is not None else next(iter(self.workers), None)
        self.calls.append((name, method))
        await asyncio.sleep(0)  # as between processes, nothing is there at once
        if name not in self.workers:
            raise WorkerLost(f"worker {name} is gone")
        if self.before is not None:
            self.before(name, method, args)
        yield name, self.workers[name], self._dead.setdefault(name, asyncio.Event())

    async def _first(self, work, dead, name, within_s, late, silence_s=None):
        """What `work` gives, unless the worker dies or stops before."""
        dying = asyncio.ensure_future(dead.wait())
        silent_s = 0.0
        try:
            async with asyncio.timeout(within_s):
                while name in self._stopped or not work.done():
                    await asyncio.wait({work, dying}, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
                    if dying.done():
                        raise WorkerLost(f"worker {name} died")
                    if name in self._stopped:  # whatever it has done, nobody hears of it
                        await asyncio.sleep(0.02)
                        silent_s += 0.02
                        if silence_s is not None and silent_s > silence_s:
                            raise WorkerLost(f"worker {name} is silent")
                return await work
        except TimeoutError:
            raise late from None
        except SparseVilaError:
            raise
        except Exception as error:
            raise Internal(f"{type(error).__name__}: {error}") from error
        finally:
            dying.cancel()


_END = object()


async def _only(result):
    yield await result if inspect.isawaitable(result) else result


async def _result(method, args):
    result = method(*args)
    return await result if inspect.isawaitable(result) else result
