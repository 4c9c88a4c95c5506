"""The input of a job whose images are looked at, for the check before the model is loaded.

Only that check needs it. The run reads the input itself, and the engine gives bad images the same
errors.
"""

from collections.abc import Callable, Iterator

from idefics2_engine.images.loader import MediaConfig
from idefics2_engine.jobs.job_row import JobRow
from idefics2_engine.jobs.plan.image_check import ImageCheck, check_images
from idefics2_engine.jobs.readers.input_options import InputOptions
from idefics2_engine.jobs.readers.job_input import JobInput
from idefics2_engine.jobs.readers.row_ids import RowId
from idefics2_engine.sampling_params import SamplingParams


class CheckedInput(JobInput):
    """Rows of files, in which rows with bad images have an error.

    Args:
        options: What to read, and how.
        defaults: Sampling parameters of rows that give none.
        check: What to look at in images: ``"none"``, ``"exists"`` or ``"header"``.
        media: Rules for images, those of the run.

    Raises:
        ConfigError: As in ``JobInput``, or there is no such check.
    """

    def __init__(
        self,
        options: InputOptions,
        defaults: SamplingParams,
        check: ImageCheck | str,
        media: MediaConfig,
    ) -> None:
        super().__init__(options, defaults)
        self._check = ImageCheck.named(check)
        self._media = media

    def rows(self, on_id: Callable[[RowId], None] | None = None) -> Iterator[JobRow]:
        """Yield the rows as ``JobInput.rows`` does."""
        return check_images(super().rows(on_id), self._check, self._media)
