"""What the engine will compute for one row, found by the engine's own preparation of rows."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from idefics2_engine.errors import PromptTooLongError
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.plan.header_reader import HeaderReader, UnreadTile
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.writers.row_error import row_error_of
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.request_builder import RequestBuilder, RowDraft, row_error
from idefics2_engine.runtime.config import PAGE_SIZE
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.sequence import Request, add_page_names

# Rows that a thread plans at a time
_ROWS_OF_THREAD = 16


class PlannedTile(NamedTuple):
    """A tile of a prompt.

    Attributes:
        name: Equal tiles have equal names.
        num_patches: Its patches.
        begin: Its first token in the prompt.
        end: One more than its last token.
    """

    name: bytes
    num_patches: int
    begin: int
    end: int


class PlannedRow(NamedTuple):
    """One row and what it takes. It is small, and travels between processes.

    Attributes:
        number: Place of the row in the input, from 0.
        id: Identifier of the row.
        place: Where the row is, for messages to the operator.
        error: Why it will fail. The other fields are empty then.
        longest: Tokens of a prompt that does not fit.
        num_images: Images of the prompt.
        num_unread: Those whose size is not known, which count as the largest ones.
        tiles: Its tiles, in order.
        num_prompt: Tokens of the prompt, image tokens included.
        max_tokens: Most tokens of each answer.
        num_answers: Answers.
        page_names: Names of the prompt's full pages. Equal prefixes have equal names.
        is_short: Whether ``max_tokens`` are fewer than a short answer has that satisfies the row's
            constraint.
    """

    number: int
    id: str | int
    place: str
    error: RowError | None = None
    longest: int = 0
    num_images: int = 0
    num_unread: int = 0
    tiles: Sequence[PlannedTile] = ()
    num_prompt: int = 0
    max_tokens: int = 0
    num_answers: int = 1
    page_names: Sequence[bytes] = ()
    is_short: bool = False

    @property
    def num_patches(self) -> int:
        """Patches of all tiles."""
        return sum([tile.num_patches for tile in self.tiles])

    @property
    def num_image(self) -> int:
        """Image tokens of the prompt."""
        return sum([tile.end - tile.begin for tile in self.tiles])


class RowPlanner:
    """Plans rows; thread-safe.

    Args:
        processor: That of the run.
        config: Configuration of the model.
        generation: End tokens and bad words of the checkpoint.
        max_model_len: Most tokens of a prompt and its answer together.
        defaults: Parameters of rows that have none.
        check: What to look at of an image.
    """

    def __init__(
        self,
        processor: Processor,
        config: ModelConfig,
        generation: GenerationConfig,
        max_model_len: int,
        *,
        defaults: SamplingParams,
        check: ImageCheck,
    ) -> None:
        self._reader = HeaderReader.of(processor, check)
        self._builder = RequestBuilder(
            processor, config, generation, max_model_len, seed=0, reader=self._reader
        )
        # It has no workers, so all rows may be one job
        self._job = self._reader.job()
        self._defaults = defaults
        self._media_root = processor.media.allowed_media_root

    def plan(self, row: JobRow) -> PlannedRow:
        """Prepare a row as the engine does, without decoding its images."""
        return self.plan_batch([row])[0]

    def plan_batch(self, rows: Sequence[JobRow]) -> list[PlannedRow]:
        """Plan ``rows``, whose headers are read in threads."""
        good = [row for row in rows if row.error is None]
        drafts = self._builder.read_rows(
            [(row.to_engine(), row.number) for row in good], self._defaults
        )
        planned = iter(self._finish(list(zip(good, drafts, strict=True))))
        return [_failed(row, row.error) if row.error else next(planned) for row in rows]

    def _finish(self, drafts: Sequence[tuple[JobRow, RowDraft | Exception]]) -> list[PlannedRow]:
        threads = min(self._reader.num_threads, -(-len(drafts) // _ROWS_OF_THREAD))
        if threads < 2 or self._reader.check is ImageCheck.NONE:
            return [self._plan(*draft) for draft in drafts]
        parts = [drafts[at : at + _ROWS_OF_THREAD] for at in range(0, len(drafts), _ROWS_OF_THREAD)]
        with ThreadPoolExecutor(threads, "idefics2-plan") as pool:
            planned = pool.map(lambda part: [self._plan(*draft) for draft in part], parts)
            return [one for part in planned for one in part]

    def _plan(self, row: JobRow, draft: RowDraft | Exception) -> PlannedRow:
        """Build the request of a row that was read, or return its error."""
        try:
            if isinstance(draft, Exception):
                raise draft
            request = self._builder.build_row(draft, "", self._job)
        except Exception as raised:
            error = row_error(raised)
            longest = error.got if isinstance(error, PromptTooLongError) else 0
            return _failed(row, row_error_of(error, self._media_root), longest)
        num_images = len(draft.prompt.images)
        num_unread = sum([isinstance(item.tile, UnreadTile) for item in request.images])
        per_image = len(request.images) // max(1, num_images)
        return PlannedRow(
            *_named(row),
            num_images=num_images,
            num_unread=num_unread // max(1, per_image),
            tiles=[
                PlannedTile(item.tile.fingerprint, item.tile.num_patches, item.begin, item.end)
                for item in request.images
            ],
            num_prompt=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            num_answers=request.params.n,
            page_names=_page_names(request),
            is_short=(
                request.constraint is not None
                and request.constraint.fewest_tokens > request.max_tokens
            ),
        )


def _named(row: JobRow) -> tuple[int, str | int, str]:
    return row.number, row.id, row.place


def _failed(row: JobRow, error: RowError, longest: int = 0) -> PlannedRow:
    return PlannedRow(*_named(row), error, longest)


def _page_names(request: Request) -> list[bytes]:
    # The last token of a prompt is always computed, and so are those whose successor is scored
    end = len(request.prompt_token_ids) - 1
    if request.params.prompt_logprobs is not None:
        end = max(0, request.params.prompt_logprobs_start - 1)
    names: list[bytes] = []
    add_page_names(names, request.prompt_token_ids[:end], request.images, PAGE_SIZE)
    return names
