"""The engine on its own thread, for callers on any number of threads.

Signal handlers run on the main thread, so an interrupt of the caller never interrupts a step. The
settings of the caller's thread, such as ``torch.autocast`` and the default device, do not affect
the engine.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Self
from weakref import WeakSet

import torch

from idefics2_engine.runtime.engine import Engine
from idefics2_engine.scheduling.sequence import Request


class EngineThread:
    """A thread that builds an engine, and runs ``engine.step`` while any request is unfinished.

    The engine is built on the thread for two reasons. Libraries keep state for each thread, such as
    a workspace of cuBLAS. And the caller's default device is a mode that intercepts every call of
    PyTorch, which would add a third to the time of capturing graphs.

    Callers send commands: functions that run on the thread between two steps. There is no lock,
    because an interrupt could leave it locked.
    """

    def __init__(self, build: Callable[[], Engine], device: torch.device) -> None:
        """Build the engine with ``build``, whose exception is raised here, on ``device``."""
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_closed = False
        self._process = os.getpid()
        # Only the engine's thread uses the following attributes
        self._clients: WeakSet[Client] = WeakSet()
        self._client_of: dict[Request, Client] = {}
        # Requests that changed in a step and whose clients do not know it yet
        self._untold: list[Request] = []
        self._is_stopping = False
        built: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build, built, device), name="idefics2-engine", daemon=True
        )
        self._thread.start()
        try:
            self._engine = built.result()
        except BaseException:
            self._is_closed = True
            self._commands.put(self._stop)
            raise

    @property
    def engine(self) -> Engine:
        """The engine, which only its thread may change."""
        return self._engine

    def client(
        self,
        on_update: Callable[[Request], None],
        on_error: Callable[[BaseException], None],
        *,
        every_token: bool = False,
    ) -> "Client":
        """Return a client, whose callbacks run on the engine's thread.

        Args:
            on_update: Called with each finished request, which the engine no longer changes.
            on_error: Called once if the engine drops the client, after an internal error or on
                ``close``.
            every_token: Whether ``on_update`` is also called after each step that changed a
                request.

        Raises:
            RuntimeError: The engine was closed.
        """
        client = Client(self, on_update, on_error, every_token)
        self.command(lambda: self._clients.add(client))
        return client

    def command(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the thread, between two steps.

        Raises:
            RuntimeError: The engine was closed, or belongs to the process that this one was forked
                from.
        """
        if self._process != os.getpid():
            raise RuntimeError("LLM: a forked process must load a model of its own")
        self._commands.put(function)
        # Checking after the put guarantees that a command without an error is run
        if self._is_closed:
            raise RuntimeError("LLM: this model was closed, and answers no more")

    def close(self) -> None:
        """End the thread after its current step and report this to all clients; idempotent."""
        self._is_closed = True
        self._commands.put(self._stop)
        # Garbage collection may call this on the engine's thread, which cannot join itself. A
        # forked process does not have the thread
        if self._thread is not threading.current_thread() and self._process == os.getpid():
            self._thread.join()
            self.__dict__.pop("_engine", None)

    def add(self, client: "Client", requests: Sequence[Request]) -> None:
        """Queue ``requests``; runs on the thread as a command."""
        if client in self._clients:
            for request in requests:
                request.every_token = client.every_token
                request.may_wait = not client.every_token
                self._client_of[request] = client
                client.unfinished[request] = None
                self._engine.add(request)

    def remove(self, client: "Client") -> None:
        """Cancel the unfinished requests of ``client``; runs on the thread as a command."""
        self._clients.discard(client)
        for request in client.unfinished:
            del self._client_of[request]
            self._engine.cancel(request)
        client.unfinished = {}

    def _run(
        self, build: Callable[[], Engine], built: Future[Engine], device: torch.device
    ) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            self._engine = build()
        except BaseException as error:
            built.set_exception(error)
            return
        self._engine.clock.start()
        built.set_result(self._engine)
        del build, built
        while not self._is_stopping:
            try:
                self._obey()
                if self._client_of and not self._is_stopping:
                    # Clients decode text. If a step is in flight, the next one is launched first
                    self._untold += self._engine.step(self._tell)
                    if not self._engine.is_ahead:
                        self._tell()
            except BaseException as error:
                self._engine.reset()
                self._drop_all(error)

    def _obey(self) -> None:
        """Run all queued commands; if there is no work, wait for one first."""
        if not self._client_of:
            self._engine.clock.lap("output")
            command = self._commands.get()
            self._engine.clock.lap("idle")
            command()
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _tell(self) -> None:
        """Tell clients of the requests that have changed."""
        changed, self._untold = self._untold, []
        for request in changed:
            client = self._client_of.get(request)
            if client is None:
                continue
            if request.finished:
                del self._client_of[request]
                del client.unfinished[request]
            elif not client.every_token:
                continue
            try:
                client.on_update(request)
            except Exception as error:
                self.remove(client)
                client.on_error(error)

    def _drop_all(self, error: BaseException) -> None:
        # Finished requests are their clients' also after an error
        self._untold = [request for request in self._untold if request.finished]
        self._tell()
        clients = list(self._clients)
        self._clients.clear()
        self._client_of.clear()
        for client in clients:
            client.unfinished = {}
            client.on_error(error)

    def _stop(self) -> None:
        self._is_stopping = True
        self._engine.reset()
        self._drop_all(RuntimeError("LLM: the model was closed before it had answered"))


class Client:
    """The requests of one caller; as a context manager it cancels unfinished ones on exit."""

    def __init__(
        self,
        thread: EngineThread,
        on_update: Callable[[Request], None],
        on_error: Callable[[BaseException], None],
        every_token: bool,
    ) -> None:
        self.on_update = on_update
        self.on_error = on_error
        self.every_token = every_token
        # Only the engine's thread uses this
        self.unfinished: dict[Request, None] = {}
        self._thread = thread

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Cancel unfinished requests."""
        self.cancel()

    def cancel(self) -> None:
        """Cancel unfinished requests without calling ``on_error``; idempotent."""
        # A closed engine has already dropped every client
        with contextlib.suppress(RuntimeError):
            self._thread.command(lambda: self._thread.remove(self))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all ``requests`` before the engine's next step.

        Raises:
            RuntimeError: The engine was closed.
        """
        self._thread.command(lambda: self._thread.add(self, requests))
