"""A worker process: it builds an engine and answers the rows that the parent sends.

It ends when its connection closes, which happens at the latest when the parent ends, in whatever
way.
"""

import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from queue import SimpleQueue

import idefics2_engine
from idefics2_engine.jobs.workers.engine_spec import build_engine
from idefics2_engine.jobs.workers.messages import Answered, Begin, Build, Ready, ToWorker
from idefics2_engine.jobs.workers.row_service import answer_rows, build_failed
from idefics2_engine.outputs import RequestOutput

LOG_MARK = "\x1e"
"""Begins a line of standard error that is a log record: its level, logger and message in JSON."""


def main(fd: int) -> None:
    """Answer rows until the connection closes; never returns.

    Args:
        fd: A connected socket.
    """
    # These are for the parent, which decides what becomes of the job
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(fd, False)
    connection: Connection = Connection(fd)
    inbox: SimpleQueue[ToWorker] = SimpleQueue()
    try:
        build: Build = connection.recv()
        _log_to_stderr(build.log_level)
        threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
        try:
            engine = build_engine(build.spec, build.place)
        except Exception as error:
            traceback.print_exc()
            connection.send(build_failed(error))
            return
        connection.send(Ready())
        outbox: SimpleQueue[RequestOutput] = SimpleQueue()
        threading.Thread(target=_send, args=(connection, outbox), daemon=True).start()
        while True:
            begin = inbox.get()
            assert isinstance(begin, Begin)
            for output in answer_rows(engine, begin, inbox, build.place.number):
                outbox.put(output)
    except (EOFError, ConnectionError):
        # The parent ended
        os._exit(0)


def _receive(connection: Connection, inbox: SimpleQueue[ToWorker]) -> None:
    """Receive messages; end the process, whatever it is doing, when the connection closes."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _send(connection: Connection, outbox: SimpleQueue[RequestOutput]) -> None:
    """Send outputs, those of one step of the engine in one message."""
    try:
        while True:
            outputs = [outbox.get()]
            while not outbox.empty():
                outputs.append(outbox.get())
            connection.send(Answered(outputs))
    except OSError:
        os._exit(0)
    except BaseException:
        # Without this thread the process would be of no use
        traceback.print_exc()
        os._exit(1)


def _log_to_stderr(level: int) -> None:
    """Write log records to standard error so that the parent can log them again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RecordFormatter())
    logger = logging.getLogger(idefics2_engine.__name__)
    logger.addHandler(handler)
    logger.setLevel(level)
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str, category: type[Warning], *_place: object, **_more: object
) -> None:
    """Log a warning in one line."""
    logging.getLogger(idefics2_engine.__name__).warning("%s: %s", category.__name__, message)


class _RecordFormatter(logging.Formatter):
    """Formats a record as one line, also if its message or its traceback has several."""

    def format(self, record: logging.LogRecord) -> str:
        return LOG_MARK + json.dumps([record.levelno, record.name, super().format(record)])
