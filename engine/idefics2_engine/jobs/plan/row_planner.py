"""What the engine will compute for one row, found by the engine's own preparation of rows."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from idefics2_engine.errors import PromptTooLongError
from idefics2_engine.jobs.job_row import JobRow, RowError
from idefics2_engine.jobs.plan.header_reader import HeaderReader, UnreadTile
from idefics2_engine.jobs.plan.image_check import ImageCheck
from idefics2_engine.jobs.writers.row_error import row_error_of
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.detokenizer import Detokenizer
from idefics2_engine.prompts.processor import Processor
from idefics2_engine.request_builder import RequestBuilder, row_error
from idefics2_engine.runtime.config import PAGE_SIZE
from idefics2_engine.sampling.generation_config import GenerationConfig
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.placeholders import ImageItem
from idefics2_engine.scheduling.sequence import Request
from idefics2_engine.scheduling.sequence import Sequence as Answer

# Rows that threads plan before the first of them is used
_BATCH = 512


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row and what it takes.

    Attributes:
        row: The row.
        error: Why it will fail. The other fields are empty then.
        longest: Tokens of a prompt that does not fit.
        num_images: Images of the prompt.
        num_unread: Those whose size is not known, which count as the largest ones.
        items: Its tiles and their places among the tokens.
        num_prompt: Tokens of the prompt, image tokens included.
        num_image: Image tokens of the prompt.
        max_tokens: Most tokens of each answer.
        num_answers: Answers.
        page_names: Names of the prompt's full pages. Equal prefixes have equal names.
    """

    row: JobRow
    error: RowError | None = None
    longest: int = 0
    num_images: int = 0
    num_unread: int = 0
    items: Sequence[ImageItem] = ()
    num_prompt: int = 0
    num_image: int = 0
    max_tokens: int = 0
    num_answers: int = 1
    page_names: Sequence[bytes] = ()

    @property
    def num_patches(self) -> int:
        """Patches of all tiles."""
        return sum(item.tile.num_patches for item in self.items)


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
        self._defaults = defaults
        self._media_root = processor.media.allowed_media_root

    @property
    def num_threads(self) -> int:
        """Threads that read headers at once."""
        return self._reader.num_threads

    def plan(self, row: JobRow) -> PlannedRow:
        """Prepare a row as the engine does, without decoding its images."""
        if row.error is not None:
            return PlannedRow(row, row.error)
        try:
            draft = self._builder.read_row(row.to_engine(), self._defaults, row.number)
            request = self._builder.build_row(draft, "", self._reader.job())
        except Exception as raised:
            error = row_error(raised)
            longest = error.got if isinstance(error, PromptTooLongError) else 0
            return PlannedRow(row, row_error_of(error, self._media_root), longest)
        tiles = [item.tile for item in request.images]
        num_images = len(draft.prompt.images)
        num_unread = sum(isinstance(tile, UnreadTile) for tile in tiles)
        per_image = len(tiles) // max(1, num_images)
        return PlannedRow(
            row,
            num_images=num_images,
            num_unread=num_unread // max(1, per_image),
            items=request.images,
            num_prompt=len(request.prompt_token_ids),
            num_image=sum(item.end - item.begin for item in request.images),
            max_tokens=request.max_tokens,
            num_answers=request.params.n,
            page_names=self._page_names(request),
        )

    def plan_all(self, rows: Iterable[JobRow]) -> Iterator[PlannedRow]:
        """Plan ``rows`` in threads, lazily and in order."""
        rest = iter(rows)
        with ThreadPoolExecutor(self.num_threads, "idefics2-plan") as pool:
            while batch := list(islice(rest, _BATCH)):
                yield from pool.map(self.plan, batch)

    def _page_names(self, request: Request) -> list[bytes]:
        if request.params.prompt_logprobs is not None:
            # Their prompts are computed, whatever a cache has
            return []
        tokenizer = self._builder.processor.tokenizer
        answer = Answer(request, 0, frozenset(), Detokenizer(tokenizer, True))
        # The last token of a prompt is always computed
        return answer.page_names(PAGE_SIZE)[: (len(request.prompt_token_ids) - 1) // PAGE_SIZE]
