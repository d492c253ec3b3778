"""Asking a run to stop from outside: it ends after its step, with the state saved."""

import signal
import types

import jax

from starflow2_jax.parallel import distributed


class Interruptible:
    """Whether to stop; to be asked once after each step, by all processes of a job alike.

    A process that is alone stops after SIGINT or SIGTERM; a second one acts at once. In a job of
    several, SIGTERM to any of them stops all at the same step (`distributed.preempted`), so its
    handler is left to JAX.
    """

    def __enter__(self) -> "Interruptible":
        self._asked = False
        self._steps = 0
        self._before = {}

        def ask(number: int, frame: types.FrameType | None) -> None:
            del frame
            self._asked = True
            signal.signal(number, self._before[number])

        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, ask)
        return self

    def __call__(self) -> bool:
        """Whether the step that has just been taken is the last one."""
        self._steps += 1
        return self._asked or distributed.preempted(self._steps)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
