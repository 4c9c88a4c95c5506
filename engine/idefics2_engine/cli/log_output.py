"""The options ``-v`` and ``--log-level``, which print the engine's logs on standard error."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import idefics2_engine

_LEVELS = ("debug", "info", "warning", "error")


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``log_output`` reads."""
    group = parser.add_argument_group("logging").add_mutually_exclusive_group()
    group.add_argument(
        "-v",
        dest="log_level",
        action="store_const",
        const="info",
        help="log to standard error what is loaded, sizes and times; --log-level info",
    )
    group.add_argument(
        "--log-level", choices=_LEVELS, help="log this and above (default: nothing is logged)"
    )


class _JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "event": "log",
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


@contextmanager
def log_output(args: argparse.Namespace) -> Iterator[None]:
    """Log to standard error from the level in ``args`` upwards, as long as the context lasts.

    Without a level nothing is logged.
    """
    if args.log_level is None:
        yield
        return
    logger = logging.getLogger(idefics2_engine.__name__)
    handler = logging.StreamHandler(sys.stderr)
    as_json = getattr(args, "log_format", "text") == "json"
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if as_json else text)
    level_before = logger.level
    logger.addHandler(handler)
    logger.setLevel(args.log_level.upper())
    try:
        yield
    finally:
        logger.setLevel(level_before)
        logger.removeHandler(handler)
