"""The engine on a thread of its own, for callers on any number of threads.

Signal handlers run on the main thread, so an interrupt or a time-out of the caller never cuts off a
step. Settings of the caller's thread, such as ``torch.autocast`` and the default device, do not
reach the engine either.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Self
from weakref import WeakSet

import torch

from idefics2_engine.runtime.engine import Engine
from idefics2_engine.scheduling.sequence import Request


class EngineThread:
    """Steps ``engine`` while any request is unfinished; the thread starts with the first client.

    Callers talk to the engine through commands, functions that run on the thread between two steps.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Guards the next two; reentrant, because garbage collection may close the engine at any
        # point
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        # What follows is used on the thread alone
        self._clients: WeakSet[Client] = WeakSet()
        self._client_of: dict[Request, Client] = {}
        self._is_stopping = False

    def client(
        self,
        on_update: Callable[[Request], None],
        on_error: Callable[[BaseException], None],
        *,
        every_token: bool = False,
    ) -> "Client":
        """Return a room for requests whose progress is told on the engine's thread.

        Args:
            on_update: Is called with each request that has finished, which the engine then no
                longer changes.
            on_error: Is called once if the engine drops the client: after a fault of its own, or
                when it is closed.
            every_token: Whether ``on_update`` is called after each step that changed a request too.

        Raises:
            RuntimeError: The engine was closed.
        """
        client = Client(self, on_update, on_error, every_token)
        self.command(lambda: self._clients.add(client))
        return client

    def command(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the thread, between two steps.

        Raises:
            RuntimeError: The engine was closed.
        """
        with self._lock:
            if self._is_closed:
                raise RuntimeError("LLM: this model was closed, and answers no more")
            # A process that was forked has the object, but not its thread
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name="idefics2-engine", daemon=True
                )
                self._thread.start()
            self._commands.put(function)

    def close(self) -> None:
        """End the thread after the step it is in.

        Clients are told. Does nothing the second time.
        """
        with self._lock:
            self._is_closed = True
            self._commands.put(self._stop)
            thread = self._thread
        if thread is threading.current_thread():
            return
        if thread is not None:
            thread.join()
        self.__dict__.pop("_engine", None)

    def add(self, client: "Client", requests: Sequence[Request]) -> None:
        """Queue ``requests``; a command."""
        if client in self._clients:
            for request in requests:
                self._client_of[request] = client
                client.unfinished[request] = None
                self._engine.add(request)

    def remove(self, client: "Client") -> None:
        """Cancel what is unfinished of ``client``; a command."""
        self._clients.discard(client)
        for request in client.unfinished:
            del self._client_of[request]
            self._engine.cancel(request)
        client.unfinished = {}

    def _run(self) -> None:
        device = self._engine.runner.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while not self._is_stopping:
            try:
                self._obey()
                if self._client_of and not self._is_stopping:
                    self._tell(self._engine.step())
            except BaseException as error:
                self._engine.reset()
                self._drop_all(error)

    def _obey(self) -> None:
        """Run the commands that have come; without work, wait for one."""
        if not self._client_of:
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _tell(self, changed: list[Request]) -> None:
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
    """The requests of one caller; use as a context, which cancels what is unfinished at its end."""

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
        self.unfinished: dict[Request, None] = {}  # the engine thread's own
        self._thread = thread

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Cancel what is unfinished; whoever waits for it is not told."""
        # An engine that was closed has dropped every client
        with contextlib.suppress(RuntimeError):
            self._thread.command(lambda: self._thread.remove(self))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue ``requests``, all before the engine's next step.

        Raises:
            RuntimeError: The engine was closed.
        """
        self._thread.command(lambda: self._thread.add(self, requests))
