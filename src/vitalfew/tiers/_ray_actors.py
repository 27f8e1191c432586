"""Actors of Ray that hold shards: starting them, calling them all at once, and one error when one is lost."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from vitalfew.core.errors import InputError, StorageError, VitalfewError, need
from vitalfew.tiers._shard import Shard
from vitalfew.tiers.lower import Traffic

__all__ = ["Actors"]

_OBJECT_STORE_BYTES = 128 << 20
_RESUME = "resume from the last commit"


class Actors:
    """One actor for each shard.

    Parameters
    ----------
    address
        A cluster to join, or None for a Ray of our own. Not used where Ray is initialised already.
    shards
        What each shard is made with.
    timeout
        Seconds an answer may take.
    traffic
        Where the time spent waiting is counted.
    """

    def __init__(
        self, address: str | None, shards: Sequence[tuple[int, int, float]], timeout: float, traffic: Traffic
    ) -> None:
        self._traffic = traffic
        self._timeout = timeout
        self._lost: str | None = None
        self._ray = need("ray")
        self._at_end = contextlib.ExitStack()
        _connect(self._ray, address, len(shards), self._at_end)
        self._session = self._current()
        # No processor is reserved: an actor that waits for one would wait for ever on a busy cluster.
        actor = self._ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy="SPREAD")(Shard)
        self._actors = [actor.remote(*shard) for shard in shards]

    def ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]], extra: float = 0.0) -> dict[int, Any]:
        """Call a method of these shards, all at once, and return what they answer.

        Parameters
        ----------
        arguments
            For each shard to call.
        extra
            Seconds to wait beyond the timeout.

        Raises
        ------
        StorageError
            If a shard refuses, for a reason of its own; or if it is gone, after which no call is made any more:
            what the other shards took of the batch cannot be told.
        """
        if self._lost is None and not self._attached():
            self._lost = "the session with Ray has ended"
        if self._lost is not None:
            raise StorageError(self._lost, hint=_RESUME)
        start = time.perf_counter()
        end = start + self._timeout + extra
        calls, answers, refusal = {}, {}, None
        k = -1
        try:
            for k, args in arguments.items():
                calls[k] = getattr(self._actors[k], method).remote(*args)
            for k, call in calls.items():
                try:
                    answers[k] = self._ray.get(call, timeout=max(1e-3, end - time.perf_counter()))
                except self._ray.exceptions.RayTaskError as error:
                    # A shard that refuses is well; the others may still be writing, so they are waited for.
                    if not isinstance(error.cause, VitalfewError):
                        raise
                    refusal = error.cause
        except self._ray.exceptions.RayError as error:
            self._lost = f"shard {k} of {len(self._actors)} is gone ({self._reason(error)})"
            raise StorageError(self._lost, hint=_RESUME) from error
        finally:
            self._traffic.seconds += time.perf_counter() - start
        if refusal is not None:
            raise refusal
        return answers

    def close(self) -> None:
        """End the actors, and Ray where it is ours."""
        # After the program has shut Ray down, a call on an actor would start a fresh Ray.
        if self._attached():
            for actor in self._actors:
                with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                    self._ray.kill(actor)
            self._at_end.close()
        self._actors = []
        self._lost = "the tier is closed"

    def _attached(self) -> bool:
        return bool(self._ray.is_initialized()) and self._session == self._current()

    def _current(self) -> tuple[str, str]:
        # A worker has the same id in every Ray that is started here, a node has it in every session with one cluster.
        context = self._ray.get_runtime_context()
        return context.get_node_id(), context.get_worker_id()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, self._ray.exceptions.GetTimeoutError):
            return f"no answer within {self._timeout:g} s"
        cause = getattr(error, "cause", None)
        return _first_line(error).rstrip(".") if cause is None else repr(cause)


def _connect(ray: ModuleType, address: str | None, workers: int, at_end: contextlib.ExitStack) -> None:
    """Use the Ray that is there, or join or start one and leave it at the end."""
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", there):
            raise InputError(
                f"Ray is connected to {there}, not to {address}", hint="leave out address, or shut Ray down"
            )
        return
    # One processor for each shard: as many workers are started at once, and the actors take them over.
    local = {"num_cpus": workers, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address and ":" in address:
            # Ray itself tries for minutes.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else local))
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise StorageError(
            f"Ray cannot be reached at {address or 'this machine'} ({_first_line(error)})",
            hint="check the address, and that its Ray and Python versions are the same",
        ) from error
    at_end.callback(ray.shutdown)
    if threading.current_thread() is threading.main_thread():
        # Ray has set a handler that ends its processes when this one is asked to end; the program's own has precedence.
        if handler is signal.SIG_DFL:
            at_end.callback(_set_handler, handler)
        elif handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _set_handler(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
