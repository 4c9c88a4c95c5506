"""transformers' Idefics2 processor with this package's preparation of images."""

from typing import Any

import transformers

from idefics2_engine.hf.image_processor import Idefics2ImageProcessor


class Idefics2Processor(transformers.Idefics2Processor):
    """transformers' class of the same name. Its ``image_processor`` prepares images faster."""

    # transformers reads from this signature which files belong to the processor
    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any = None,
        image_seq_len: int = 64,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(image_processor, Idefics2ImageProcessor):
            image_processor = Idefics2ImageProcessor(**image_processor.to_dict())
        super().__init__(image_processor, tokenizer, image_seq_len, chat_template, **kwargs)
