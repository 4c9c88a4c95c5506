"""Ray Data: datasets whose rows are answered by actors, with the names of ``ray.data.llm``.

In: a dataset. Out: the same rows with the columns of their answers. Ray is imported by functions
alone.
"""

from idefics2_engine.jobs.ray_data.engine import Idefics2Engine
from idefics2_engine.jobs.ray_data.processor import (
    Idefics2ProcessorConfig,
    Processor,
    build_processor,
)

__all__ = ["Idefics2Engine", "Idefics2ProcessorConfig", "Processor", "build_processor"]
