"""Futures of single rows, for callers on any number of threads and in event loops."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial

from idefics2_engine.images.reader import ImageReader
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.request_builder import RequestBuilder, read_params, row_error
from idefics2_engine.runtime.engine_thread import Client, EngineThread
from idefics2_engine.scheduling.sequence import Request
from idefics2_engine.task_threads import TaskThreads


class Submitter:
    """Answers rows one by one, each through a future that has a client of its own.

    Several threads prepare rows. One more thread sets results and runs the callers' callbacks, so
    a slow callback delays neither the engine nor the preparation.

    Args:
        thread: Runs the engine.
        images: Reads the rows' images.
        wait_turn: Called on the preparing threads before each row, to let others go first.
    """

    def __init__(
        self, thread: EngineThread, images: ImageReader, wait_turn: Callable[[], None]
    ) -> None:
        self._thread = thread
        self._wait_turn = wait_turn
        self._job = images.job()
        self._preparing = TaskThreads("idefics2-submit", images.num_threads)
        self._answering = TaskThreads("idefics2-answer", 1)
        # Only the engine's thread uses this
        self._has_started = False

    def submit(self, builder: RequestBuilder, row: object, params: object) -> Future[RequestOutput]:
        """Copy ``row`` and return the future of its output.

        Args:
            builder: Builds the request.
            row: See ``LLM.submit``.
            params: Parameters of a row that has none of its own.

        Raises:
            RuntimeError: The engine was closed.
        """
        future: Future[RequestOutput] = Future()
        # An interrupt, which never reaches the engine's thread, cannot start half of the threads
        self._thread.command(self._start)
        try:
            draft = builder.read_row(row, read_params(params))
        except Exception as error:
            future.set_exception(row_error(error))
            return future

        def answer(request: Request) -> None:
            self._answering.put(partial(_set_output, future, request))

        def fail(error: BaseException) -> None:
            self._answering.put(partial(_set_exception, future, error))

        def prepare() -> None:
            self._wait_turn()
            if future.done():
                return
            try:
                request = builder.build_row(draft, None, self._job)
            except BaseException as error:
                fail(row_error(error))
                return
            # A closed engine has already failed the future
            with contextlib.suppress(RuntimeError):
                client.submit([request])

        client = self._thread.client(answer, fail)
        future.add_done_callback(partial(_end, client))
        self._preparing.put(prepare)
        return future

    def close(self) -> None:
        """End the threads after all results are set, without waiting for it."""
        self._answering.put(self._close)

    def _start(self) -> None:
        if not self._has_started:
            self._preparing.start()
            self._answering.start()
            self._has_started = True

    def _close(self) -> None:
        # The engine's thread fails unfinished futures before it ends, and this waits for its end
        self._thread.close()
        self._preparing.close()
        self._answering.close()


def _set_output(future: Future[RequestOutput], request: Request) -> None:
    if request.error is not None:
        _set_exception(future, request.error)
        return
    try:
        output = request.output()
    except Exception as error:
        _set_exception(future, error)
        return
    # The caller may have canceled it
    with contextlib.suppress(InvalidStateError):
        future.set_result(output)


def _set_exception(future: Future[RequestOutput], error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


def _end(client: Client, future: Future[RequestOutput]) -> None:
    """Cancel the request of a future that was canceled, and tell those who wait for the future."""
    client.cancel()
    if future.cancelled():
        future.set_running_or_notify_cancel()
