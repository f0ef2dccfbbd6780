"""Which run a call of the denoiser belongs to: that of the block it is made in, such as a pipeline's call, or one that
counts the calls outside of any block.

A run belongs to the thread that began it. Calls of other threads are refused until it ends; inside `Scopes.disabled` a
thread's calls pass it by.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastercache.errors import RunError, warn
from fastercache.runtime.run import Run, RunSpec
from fastercache.runtime.timesteps import Habits, Timesteps, read

LONG_PAUSE = 30.0
"""Seconds between two calls of a run outside any block after which it is said that the run goes on."""

_DISABLED: ContextVar[frozenset[Scopes]] = ContextVar("fastercache_disabled", default=frozenset())
"""Those that are switched off in this thread, or in this task of it."""


class Scope:
    """The calls that belong to one run: those of a pipeline's call or of a `with` block, or a count of them outside of
    any.

    what: the block, for messages; "" outside of any. thread: the one that opened it. run: made at the first call.
    timesteps, last_call: outside a block, what the calls have shown and when the last of them ended. failed: the error
    that ended the run.
    """

    def __init__(self, describe: Callable[[], RunSpec], habits: Habits, what: str = ""):
        self.describe, self.what = describe, what
        self.thread = threading.current_thread()
        self.run: Run | None = None
        self.timesteps = Timesteps(habits)
        self.last_call: float | None = None
        self.longest_pause = 0.0
        self.failed: str | None = None

    @property
    def position(self) -> int:
        return 0 if self.run is None else self.run.position

    @property
    def steps(self) -> int:
        return 0 if self.run is None else len(self.run)

    @property
    def mine(self) -> bool:
        """Whether it belongs to the thread that asks."""
        return self.thread is threading.current_thread()


class Scopes:
    """The scopes of one model, of which one is open at a time.

    model: its class's name. timestep: its argument of that meaning. default: of the runs outside any block, `None`
    where such calls are uncached. at_end: called with a scope that has ended, and with how, where that was not after
        its last step.
    """

    def __init__(self, model: str, timestep: str, default: RunSpec | None, at_end: Callable[[Scope, str | None], None]):
        self.model, self.timestep, self.default, self.at_end = model, timestep, default, at_end
        self.current: Scope | None = None
        self._habits = Habits()
        self._lock = threading.Lock()
        self._calling: threading.Thread | None = None
        self._said_uncached = False

    @property
    def _block(self) -> Scope | None:
        """The open scope, if it is that of a block."""
        return self.current if self.current is not None and self.current.what else None

    @property
    def knows_its_runs(self) -> bool:
        """Whether a call that is made now belongs to a run."""
        return self.default is not None or self._block is not None

    def refuse_under_way(self, what: str) -> None:
        """`RunError` while a run is under way in a block, or a call is being made, in any thread."""
        if self._calling is not None or (self._block is not None and self._block.thread.is_alive()):
            raise RunError(f"a run is under way; {what} after it has ended")

    # ---- blocks ------------------------------------------------------------------------------------------------------

    @contextmanager
    def block(self, describe: Callable[[], RunSpec], what: str, may_be_idle: bool) -> Iterator[None]:
        """All calls inside belong to one run; as `Engine.scope`."""
        with self._lock:
            self._leave_that_of_a_dead_thread()
            if self._block is not None:
                where = "this thread" if self._block.mine else "another thread"
                raise RunError(
                    f"a run of this {self.model} is already under way in {where}; let it end first, or compile a "
                    "second copy of the model for a second run at the same time"
                )
            self._leave_unfinished("a run in a scope begins")
            scope = self.current = Scope(describe, self._habits, what)
        try:
            yield
        except BaseException:
            self._end_block(scope, f"ended by an error after {scope.position} steps")
            raise
        else:
            self._end_block(scope, "idle" if may_be_idle and scope.run is None else None)

    def _end_block(self, scope: Scope, note: str | None) -> None:
        if self.current is scope:  # else that of a thread that had died inside it, found at last
            self.end(note)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Calls of this thread inside go straight to the model. Refused inside a run of its own, whose steps would no
        longer add up."""
        if self._block is not None and self._block.mine:
            raise RunError("a run is under way; disable caching before it begins or after it has ended")
        before = _DISABLED.get()
        _DISABLED.set(before | {self})
        try:
            yield
        finally:
            if self not in before:
                _DISABLED.set(_DISABLED.get() - {self})

    @property
    def is_disabled(self) -> bool:
        """Whether this thread is inside `disabled`."""
        return self in _DISABLED.get()

    # ---- calls -------------------------------------------------------------------------------------------------------

    def enter(self, arguments: Mapping[str, Any]) -> Scope | None:
        """The scope of a call that begins, or `None` where it is to run uncached. `RunError` where it belongs to
        another thread."""
        thread, scope = threading.current_thread(), self.current
        # No lock is needed for one's own: nobody else ends the scope of a thread that lives.
        if scope is None or scope.thread is not thread or not (scope.what or self._goes_on(scope, arguments)):
            with self._lock:
                scope = self._found(arguments)
        if scope is not None:
            self._calling = thread
        return scope

    def leave(self, scope: Scope, failed: bool) -> None:
        """After the call."""
        self._calling = None
        if failed:
            if not scope.what:
                self.end(f"ended by an error after {scope.position} steps")
        elif not scope.what:
            scope.last_call = time.monotonic()
            if scope.run is not None and scope.run.done:
                scope.timesteps.finish(len(scope.run))
                self.end(None)

    def end(self, note: str | None) -> None:
        """The open scope has ended, if there is one. note: how, where that was not after its last step."""
        scope, self.current = self.current, None
        if scope is not None:
            self.at_end(scope, note)

    def _leave_that_of_a_dead_thread(self) -> None:
        if self._block is not None and not self._block.thread.is_alive():
            self._leave_unfinished("its thread has ended")

    def _leave_unfinished(self, why: str) -> None:
        """End a run that was left before its last step, and say so. `RunError` if it may be still under way in another
        thread."""
        scope = self.current
        if scope is None:
            return
        if not scope.mine and scope.thread.is_alive():
            raise RunError(
                f"this {self.model} is in a run of another thread, which has made {scope.position} of {scope.steps} "
                "steps; a run owns its model until it ends: let it end, give it up by fastercache.release, or compile "
                "a second copy of the model"
            )
        self.end(f"left after {scope.position} steps")
        warn(f"a run of {self.model} was left after {scope.position} of {scope.steps} steps: {why}")

    def _found(self, arguments: Mapping[str, Any]) -> Scope | None:
        """The scope of a call that does not go on in this thread's own."""
        self._leave_that_of_a_dead_thread()
        scope = self._block or self._outside(arguments)
        if scope is not None and not scope.mine:
            raise RunError(f"this {self.model} is in a run of another thread; a run owns its model until it ends")
        return scope

    # ---- calls outside any block -------------------------------------------------------------------------------------

    def _outside(self, arguments: Mapping[str, Any]) -> Scope | None:
        """The scope of a call that does not go on in the run before: every `steps` calls are one, unless a call shows
        that it was left."""
        if self.default is None:
            if not self._said_uncached:
                self._said_uncached = True
                warn(
                    f"{self.model} was called outside a run, so it ran uncached: call its pipeline, enter "
                    "fastercache.run(model, steps=..., cfg=...), or compile with steps= and cfg="
                )
            return None
        if (scope := self.current) is not None:
            self._leave_unfinished(f"{self._why_left(scope, arguments)}, so a new run begins")
        default = self.default
        scope = self.current = Scope(lambda: default, self._habits)
        scope.timesteps.takes(read(arguments.get(self.timestep)), 0, False)
        return scope

    def _goes_on(self, scope: Scope, arguments: Mapping[str, Any]) -> bool:
        """Whether a call of its thread outside any block is the next of this run. After a long pause it warns that the
        run goes on."""
        run = scope.run
        if run is None or not run.fits(arguments):
            return False
        if not scope.timesteps.takes(read(arguments.get(self.timestep)), run.position, run.guidance.between_calls):
            return False
        pause = 0.0 if scope.last_call is None else time.monotonic() - scope.last_call
        if pause > scope.longest_pause:
            if pause > max(LONG_PAUSE, 20 * scope.longest_pause):
                warn(
                    f"a run of {self.model} goes on at step {scope.position + 1} of {scope.steps}, {pause:.0f} s after "
                    "its last call: if this is another video, call fastercache.release before it, or enter "
                    "fastercache.run(model, steps=..., cfg=...) around each loop"
                )
            scope.longest_pause = pause
        return True

    def _why_left(self, scope: Scope, arguments: Mapping[str, Any]) -> str:
        """Why a call outside any block is not the next of this run."""
        if not scope.mine:
            return "its thread has ended"
        if scope.run is not None and not scope.run.fits(arguments):
            return "the next call has inputs of another shape, dtype or device"
        return (
            f"the timestep went back or began again; compile {self.model} with the number of steps that its loops "
            "have, or enter fastercache.run(model, steps=..., cfg=...) around each loop"
        )
