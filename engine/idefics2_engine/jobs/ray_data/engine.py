"""The class that Ray Data builds in each of its actors: batches of rows in, the same rows answered."""

import asyncio
import logging
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from idefics2_engine.errors import Idefics2Error, WorkerLostError
from idefics2_engine.jobs.death_record import DeathRecord, Verdict
from idefics2_engine.jobs.ray_data.columns import (
    input_key,
    row_inputs,
    to_answer,
    to_error,
    to_row,
    with_outputs,
)
from idefics2_engine.jobs.row_room import RowRoom
from idefics2_engine.outputs import RequestOutput
from idefics2_engine.row import Row

_logger = logging.getLogger(__name__)


class SubmitEngine(Protocol):
    """What the actor asks of a model: ``LLM`` has it."""

    def submit(self, row: Row) -> Future[RequestOutput]:
        """Begin to answer a row, whose error is the future's exception."""

    def close(self) -> None:
        """Free the memory of the model."""


def build_llm(model: str | None, **options: Any) -> SubmitEngine:
    """Load the model."""
    from idefics2_engine.llm import LLM

    return LLM(model, **options)


class Idefics2Engine:
    """A callable class for ``Dataset.map_batches``, which answers the rows of batches.

    Batches of all calls share the model's steps. Rows without an answer have an error, and cost
    no other row anything.

    If the process dies, Ray starts it again and repeats its batches. A row that was in flight at
    two deaths runs with no other row. If the process dies then, the row has the error
    ``worker_lost``. A file for each actor says which rows these are.

    Args:
        model_source: A checkpoint's folder or hub id. If ``None``, the demo checkpoint.
        engine_kwargs: Arguments of ``LLM``.
        should_continue_on_error: Whether a row without an answer gets an error in its columns. If
            not, its error is raised and ends the dataset's execution.
        deaths_folder: Folder of the files that say which rows were in flight at deaths. If
            ``None``, the machine's folder for temporary files, and an actor that continues on
            another machine begins to count again.
        build: Loads the model, called as ``build(model_source, **engine_kwargs)``.
    """

    def __init__(
        self,
        model_source: str | None = None,
        engine_kwargs: Mapping[str, Any] | None = None,
        should_continue_on_error: bool = True,
        deaths_folder: str | None = None,
        build: Callable[..., SubmitEngine] = build_llm,
    ) -> None:
        self._continues = should_continue_on_error
        self._record = DeathRecord(_record_path(deaths_folder or tempfile.gettempdir()))
        self._room = RowRoom()
        self._llm = build(model_source, **(engine_kwargs or {}))

    async def __call__(self, batch: Any) -> Any:
        """Answer the rows of a batch, a table of Arrow or what Ray can convert to one.

        Returns:
            The table with the columns of ``columns.output_schema``.

        Raises:
            Idefics2Error: That of a row, if the engine does not continue on errors.
        """
        table = _to_table(batch)
        rows = await asyncio.gather(*map(self._answer, row_inputs(table)))
        return with_outputs(table, rows)

    def __del__(self) -> None:
        """Free the model, and remove the record of an actor that ended in order."""
        if hasattr(self, "_llm"):
            self._llm.close()
            self._record.close()

    async def _answer(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            key = input_key(inputs)
            return to_answer(await self._run(key, to_row(inputs, key)))
        except Idefics2Error as error:
            if not self._continues:
                raise
            _logger.info("a row has no answer: %s", error)
            return to_error(error)

    async def _run(self, key: str, row: Row) -> RequestOutput:
        verdict = self._record.verdict(key)
        if verdict is Verdict.LOST:
            raise WorkerLostError(
                "row: its worker ended each time, the last time without other rows"
            )
        alone = verdict is Verdict.ALONE
        async with self._room.alone() if alone else self._room.together():
            self._record.begin(key, alone=alone)
            try:
                return await asyncio.wrap_future(self._llm.submit(row))
            finally:
                self._record.end(key, alone=alone)


def _record_path(folder: str) -> Path | None:
    """Return the file of this actor's deaths, ``None`` outside of an actor."""
    import ray

    # An actor that is restarted has the same id
    actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    return None if actor is None else Path(folder, f"idefics2-deaths-{actor}.jsonl")


def _to_table(batch: Any) -> Any:
    from ray.data.block import BlockAccessor

    return BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()
