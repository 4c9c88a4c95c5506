"""The processor, which converts prompts, conversations and images to token ids and tiles."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from idefics2_engine.caller_errors import about, caller_code
from idefics2_engine.errors import ConfigError, PromptError, short_repr
from idefics2_engine.images.file_cache import FileCache
from idefics2_engine.images.file_tiles import TileRules
from idefics2_engine.images.image_info import ImageInfo
from idefics2_engine.images.loader import ImageSource, MediaConfig, load_image, own_image
from idefics2_engine.images.padded_pixels import padded_pixels
from idefics2_engine.images.parallel import read_all
from idefics2_engine.images.reader import ImageJob, ImageReader
from idefics2_engine.images.settings import PROCESSOR, image_settings
from idefics2_engine.images.tiling import ImageConfig, Tile, make_tiles
from idefics2_engine.images.workers.worker_pool import WorkerPool
from idefics2_engine.json_file import read_json_if_there
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.prompts.chat_template import ChatTemplate
from idefics2_engine.prompts.messages import read_messages
from idefics2_engine.prompts.tokenizer import (
    FAKE_IMAGE,
    IMAGE,
    Tokenizer,
    check_text,
    expand_placeholders,
)

# So many rendered conversations of at most so many characters are kept with their tokens
_KEPT_CHATS = 256
_LONGEST_KEPT = 4096
# These iterables are text or have no order, so they are not lists of token ids
_NO_LIST = (str, bytes, bytearray, memoryview, Mapping, Set)


@dataclass(frozen=True, eq=False)
class ProcessedPrompt:
    """A prompt ready for the model.

    Attributes:
        prompt: Text, with each image as one "<image>".
        token_ids: Token ids, with each tile as ``image_seq_len`` image tokens.
        tiles: Tiles in the order of their placeholders.
        image_info: What is known of each image. Without a job, only its size.
    """

    prompt: str
    token_ids: list[int]
    tiles: list[Tile]
    image_info: tuple[ImageInfo, ...] = ()


@dataclass(frozen=True, eq=False)
class PromptDraft:
    """A prompt whose images have not been read.

    Attributes:
        prompt: Text, with each image as one "<image>". ``None`` if it is decoded with the images.
        token_ids: Token ids, with each tile as ``image_seq_len`` image tokens.
        images: Sources of the images.
        media: Rules for reading them.
    """

    prompt: str | None
    token_ids: list[int]
    images: Sequence[ImageSource]
    media: MediaConfig

    def owned(self) -> "PromptDraft":
        """Return a draft that shares no mutable object with the caller.

        Arrays, tensors, Pillow images, buffers and open files are read now. File names, text and
        bytes are kept, so that ``Processor.finish`` decodes them in threads.

        Raises:
            ImageError: An image cannot be read; the message says which, if there are several.
        """
        if all(type(image) is str or type(image) is bytes for image in self.images):
            return replace(self, images=tuple(self.images))
        owned: dict[int, ImageSource] = {}
        for index, image in enumerate(self.images):
            if id(image) not in owned:
                with about(f"images[{index}]" if len(self.images) > 1 else None):
                    owned[id(image)] = own_image(image, self.media)
        return replace(self, images=[owned[id(image)] for image in self.images])


class RenderedChat(NamedTuple):
    """A conversation whose text has no tokens yet.

    Attributes:
        marked: Text for ``Tokenizer.encode_marked``.
        images: Sources of the images.
    """

    marked: str
    images: list[ImageSource]


@dataclass(frozen=True)
class Processor:
    """The conversion of text and images to the model's input, by a checkpoint's files.

    Attributes:
        tokenizer: The tokenizer.
        template: The chat template. None for a model without one.
        image_config: Preparation of images.
        image_seq_len: Image tokens per tile.
        patch_size: Pixels per side of a patch.
        grid_side: Trained positions per side.
        media: Rules for reading images.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    image_config: ImageConfig
    image_seq_len: int
    patch_size: int
    grid_side: int
    media: MediaConfig = field(default_factory=MediaConfig)

    @classmethod
    def load(
        cls,
        folder: Path,
        config: ModelConfig,
        split: bool | None = None,
        media: MediaConfig | None = None,
    ) -> "Processor":
        """Read the processor's files beside the weights in ``folder``.

        Args:
            folder: A checkpoint in the hub's format.
            config: Configuration of the model.
            split: Whether to split images. If ``None``, the checkpoint decides.
            media: Rules for reading images. If ``None``, ``MediaConfig()``.

        Raises:
            ConfigError: A file is missing or invalid, or does not fit ``config``.
        """
        tokenizer = Tokenizer.load(folder)
        settings = image_settings(folder)
        image_config = ImageConfig.from_settings(settings)
        if split is not None:
            image_config = replace(image_config, split=split)
        path = folder / PROCESSOR
        latents = config.perceiver.num_latents
        values = read_json_if_there(path)
        if values.get("image_seq_len", latents) != latents:
            raise ConfigError(
                f"{path}: image_seq_len must be the model's {latents} latents, "
                f"got {short_repr(values['image_seq_len'])}"
            )
        if tokenizer.image_id != config.image_token_id:
            raise ConfigError(
                f"{folder}/tokenizer.json: {IMAGE} must have the model's id "
                f"{config.image_token_id}, got {tokenizer.image_id}"
            )
        if tokenizer.vocab_size > config.text.vocab_size:
            raise ConfigError(
                f"{folder}/tokenizer.json: must have at most the model's {config.text.vocab_size} "
                f"tokens, got {tokenizer.vocab_size}"
            )
        patch, grid = config.vision.patch_size, config.vision.grid
        if image_config.shortest_edge < patch or image_config.longest_edge // patch > grid:
            raise ConfigError(
                f"{settings.name}: size must give every side 1 to {grid} patches of {patch} pixels, "
                f"got {image_config.shortest_edge} to {image_config.longest_edge} pixels"
            )
        return cls(
            tokenizer=tokenizer,
            template=ChatTemplate.load(folder, tokenizer),
            image_config=image_config,
            image_seq_len=latents,
            patch_size=patch,
            grid_side=grid,
            media=media or MediaConfig(),
        )

    def prompt(
        self, text: str, images: Sequence[ImageSource] | ImageSource = ()
    ) -> ProcessedPrompt:
        """Process a raw prompt like transformers' ``Idefics2Processor``.

        Args:
            text: Text, in which control tokens are recognized. Each ``<image>`` is a placeholder.
            images: An image for each placeholder, in order, or a single image.

        Raises:
            PromptError: There are more or fewer placeholders than images.
            ImageError: An image cannot be read.
        """
        return self.finish([self.draft_prompt(text, images)])[0]

    def draft_prompt(
        self, text: str, images: Sequence[ImageSource] | ImageSource = ()
    ) -> PromptDraft:
        """Process a raw prompt like ``prompt``, but leave the images to ``finish``."""
        check_text(text)
        images = _as_list(images)
        token_ids = self._expanded_ids(text, len(images), self.tokenizer.encode)
        return PromptDraft(text, token_ids, images, self.media)

    def token_prompt(
        self, token_ids: Sequence[int], images: Sequence[ImageSource] | ImageSource = ()
    ) -> ProcessedPrompt:
        """Process a prompt of token ids with expanded placeholders.

        Raises:
            PromptError: An id is out of range, or the image tokens do not fit the images.
            ImageError: An image cannot be read.
        """
        return self.finish([self.draft_token_prompt(token_ids, images)])[0]

    def draft_token_prompt(
        self, token_ids: Sequence[int], images: Sequence[ImageSource] | ImageSource = ()
    ) -> PromptDraft:
        """Process token ids like ``token_prompt``, but leave the images to ``finish``."""
        if isinstance(token_ids, _NO_LIST) or not isinstance(token_ids, Iterable):
            raise PromptError(f"token_ids: must be a list of ids, got {short_repr(token_ids)}")
        vocab_size = self.tokenizer.vocab_size
        with caller_code("token_ids", PromptError):
            ids = _plain_ids(token_ids, vocab_size)
            if ids is None:
                ids = _checked_ids(token_ids, vocab_size)
        images = _as_list(images)
        per_image = self.image_seq_len * self.image_config.tiles_per_image
        wanted, got = len(images) * per_image, ids.count(self.tokenizer.image_id)
        if got != wanted:
            raise PromptError(
                f"token_ids: must have {per_image} image tokens for each of {len(images)} images, "
                f"wanted {wanted}, got {got}"
            )
        return PromptDraft(None, ids, images, self.media)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource] | ImageSource = (),
        add_generation_prompt: bool = True,
    ) -> ProcessedPrompt:
        """Process a conversation, in whose texts and roles control tokens are not recognized.

        Args:
            messages: Messages in the format of OpenAI or transformers (``read_messages``).
            images: Images for the image parts without a source, in order.
            add_generation_prompt: End where the assistant's answer begins.

        Raises:
            PromptError: A message is malformed, the numbers of images and image parts differ, or
                the checkpoint's template cannot render the conversation.
            ImageError: An image cannot be read.
        """
        return self.finish([self.draft_chat(messages, images, add_generation_prompt)])[0]

    def draft_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource] | ImageSource = (),
        add_generation_prompt: bool = True,
        name: str = "messages",
    ) -> PromptDraft:
        """Process messages like ``chat``, but leave the images to ``finish``.

        Errors call the conversation ``name``.
        """
        return self.encode_chat(self.render_chat(messages, images, add_generation_prompt, name))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource] | ImageSource = (),
        add_generation_prompt: bool = True,
        name: str = "messages",
    ) -> RenderedChat:
        """Process messages like ``draft_chat``, but leave the tokens to ``encode_chat``."""
        if self.template is None:
            raise PromptError(
                "chat: this checkpoint has neither a chat template nor <end_of_utterance>, "
                "so it takes plain prompts only"
            )
        turns, sources = read_messages(messages, _as_list(images), name)
        return RenderedChat(self.template.render(turns, add_generation_prompt), sources)

    def prepare_chats(self, chats: Iterable[RenderedChat]) -> None:
        """Tokenize rendered conversations at once, for the next calls of ``encode_chat``."""
        texts = {expand_placeholders(chat.marked, 1, 1) for chat in chats}
        self.tokenizer.prepare([*texts])

    def encode_chat(self, chat: RenderedChat) -> PromptDraft:
        """Return the draft of a rendered conversation."""
        marked, images = chat
        read = self._read_chat if len(marked) <= _LONGEST_KEPT else self._encode_chat
        prompt, token_ids = read(marked, len(images))
        return PromptDraft(prompt, token_ids.copy(), images, self.media)

    def image_reader(self, workers: WorkerPool | None = None) -> ImageReader:
        """Return a reader of images for requests.

        Args:
            workers: Processes for jobs of many images. If ``None``, images are read in threads.
        """
        return ImageReader(self.media, self.tile_rules, FileCache(), workers)

    @property
    def tile_rules(self) -> TileRules:
        """All that the tiles of an image file depend on."""
        return TileRules(
            self.media.image_policy,
            self.media.max_image_pixels,
            self.image_config,
            self.patch_size,
            self.grid_side,
        )

    def finish(
        self,
        drafts: Sequence[PromptDraft],
        name: str = "prompts",
        job: ImageJob | None = None,
    ) -> list[ProcessedPrompt]:
        """Read the images of all ``drafts`` in parallel and return the finished prompts.

        Args:
            drafts: Results of ``draft_prompt``, ``draft_token_prompt`` or ``draft_chat``.
            name: Name of the list of prompts in errors.
            job: Reads the images, whose tiles then have whole patches only. If ``None``, they are
                read here and keep all pixels.

        Raises:
            ImageError: An image cannot be read; the message says which, if there are several.
        """
        several = len(drafts) > 1
        places = [
            (f"images[{index}]" + (f" of {name}[{number}]" if several else ""), image)
            for number, draft in enumerate(drafts)
            for index, image in enumerate(draft.images)
        ]

        def read(index: int) -> tuple[Sequence[Tile], ImageInfo]:
            place, source = places[index]
            with about(place if several or len(places) > 1 else None):
                if job is not None:
                    found = job.read(source)
                    return found.tiles, found.info
                image = load_image(source, self.media)
                tiles = make_tiles(image, self.image_config, self.patch_size, self.grid_side)
            for tile in tiles:
                # The tile caches its fingerprint, which is computed here in parallel
                _ = tile.fingerprint
            return tiles, ImageInfo(*image.size)

        threads = self.media.num_threads if job is None else job.reader.num_threads
        images = iter(read_all(read, [source for _, source in places], threads))
        prompts = []
        for draft in drafts:
            own = list(islice(images, len(draft.images)))
            prompts.append(
                ProcessedPrompt(
                    self._collapse(draft.token_ids) if draft.prompt is None else draft.prompt,
                    draft.token_ids,
                    [tile for tiles, _ in own for tile in tiles],
                    tuple(info for _, info in own),
                )
            )
        return prompts

    def padded(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[ImageSource]] | Sequence[ImageSource],
        padding_side: Literal["left", "right"] = "right",
    ) -> dict[str, npt.NDArray[Any]]:
        """Process raw prompts to transformers' rectangular form, for training and comparison.

        Args:
            texts: B raw prompts, at least one.
            images: A list of images for each prompt, or one list for all placeholders in order.
            padding_side: Side on which shorter rows are padded.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 (B, T). If there are images, also
            ``pixel_values``, float32 (B, N, 3, H, W), and ``pixel_attention_mask``, int64
            (B, N, H, W). N is the largest number of tiles of a prompt; missing tiles are zero.

        Raises:
            PromptError: Placeholders and images differ in number, or there is no padding token.
            ImageError: An image cannot be read.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise PromptError(f"texts: must be a list of strings, got {type(texts).__name__}")
        for index, text in enumerate(texts):
            check_text(text, f"texts[{index}]")
        nested = _nested(texts, images)
        if self.tokenizer.pad_id is None:
            raise PromptError("padded: needs a pad_token in tokenizer_config.json, got none")
        if padding_side not in ("left", "right"):
            raise PromptError(
                f"padding_side: must be 'left' or 'right', got {short_repr(padding_side)}"
            )
        pairs = zip(texts, nested, strict=True)
        prompts = self.finish([self.draft_prompt(text, own) for text, own in pairs])
        shape = len(prompts), max(len(prompt.token_ids) for prompt in prompts)
        arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.full(shape, self.tokenizer.pad_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        for row, prompt in enumerate(prompts):
            length = len(prompt.token_ids)
            columns = slice(length) if padding_side == "right" else slice(shape[1] - length, None)
            arrays["input_ids"][row, columns] = prompt.token_ids
            arrays["attention_mask"][row, columns] = 1
        if any(prompt.tiles for prompt in prompts):
            arrays |= padded_pixels([prompt.tiles for prompt in prompts], self.image_config)
        return arrays

    def _expanded_ids(
        self, text: str, images: int, encode: Callable[[str], list[int]]
    ) -> list[int]:
        """Return the ids of ``text`` with expanded placeholders, as many as there are images.

        The tokenizer reads one tile of one ``<image>`` for each image, whose ids are then repeated.
        It would need more time for the others than for the rest of a prompt.
        """
        placeholders = text.count(IMAGE)
        if placeholders != images:
            raise PromptError(
                f"prompt: must have one {IMAGE} for each image, wanted {images}, got {placeholders}"
            )
        expanded = self._with_all_tiles(encode(expand_placeholders(text, 1, 1)), images)
        if expanded is None:
            # A tokenizer that finds the tokens elsewhere reads the whole text
            per_image = self.image_config.tiles_per_image
            return encode(expand_placeholders(text, self.image_seq_len, per_image))
        return expanded

    def _with_all_tiles(self, ids: list[int], images: int) -> list[int] | None:
        """Return ``ids`` with all ids of each image, ``None`` unless one stands for each."""
        image_id, fake_id = self.tokenizer.image_id, self.tokenizer.fake_image_id
        own = self._image_ids
        if own is None or ids.count(image_id) != images:
            return None
        expanded: list[int] = []
        begin = 0
        for _ in range(images):
            place = ids.index(image_id, begin)
            if ids[place - 1 : place + 2] != [fake_id, image_id, fake_id]:
                return None
            expanded += ids[begin:place]
            expanded += own
            begin = place + 1
        return expanded + ids[begin:]

    @cached_property
    def _image_ids(self) -> list[int] | None:
        """Ids of an image without its first and last one, ``None`` if they cannot be repeated."""
        per_image, fake_id = self.image_config.tiles_per_image, self.tokenizer.fake_image_id
        tile = [self.tokenizer.image_id] * self.image_seq_len
        own = [*tile, *[fake_id, *tile] * (per_image - 1)]
        text = expand_placeholders(IMAGE * 2, self.image_seq_len, per_image)
        ids = self.tokenizer.encode_marked(text, add_bos=False)
        return own if ids == [fake_id, *own, fake_id, *own, fake_id] else None

    def _encode_chat(self, marked: str, images: int) -> tuple[str, list[int]]:
        """Return the text and the ids of a rendered conversation."""
        bos = self.tokenizer.bos
        # Some templates write the bos token themselves
        add_bos = bos is None or not marked.startswith(bos)
        encode = partial(self.tokenizer.encode_marked, add_bos=add_bos)
        return self.tokenizer.unmark(marked), self._expanded_ids(marked, images, encode)

    @cached_property
    def _read_chat(self) -> Callable[[str, int], tuple[str, list[int]]]:
        """``_encode_chat``, which keeps recent results: many rows ask the same about other images."""
        return lru_cache(_KEPT_CHATS)(self._encode_chat)

    def _collapse(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` with each image as one placeholder."""
        tile = FAKE_IMAGE + IMAGE * self.image_seq_len
        image = f"(?:{tile}){{{self.image_config.tiles_per_image}}}(?:{FAKE_IMAGE}(?!{IMAGE}))?"
        return re.sub(image, IMAGE, self.tokenizer.decode(ids, skip_special_tokens=False))


def _plain_ids(token_ids: Iterable[Any], vocab_size: int) -> list[int] | None:
    """Return a copy of a list of ints below ``vocab_size``, ``None`` for anything else.

    It looks at no id in Python. ``_checked_ids`` takes a millisecond for a thousand.
    """
    if type(token_ids) not in (list, tuple):
        return None
    ids: list[Any] = list(token_ids)
    if set(map(type, ids)) - {int} or (ids and not 0 <= min(ids) <= max(ids) < vocab_size):
        return None
    return ids


def _checked_ids(token_ids: Iterable[Any], vocab_size: int) -> list[int]:
    """Return the ids; raise ``PromptError`` if one is no whole number below ``vocab_size``."""
    ids = []
    for index, id in enumerate(token_ids):
        is_whole = isinstance(id, Integral) and not isinstance(id, bool)
        if not is_whole or not 0 <= id < vocab_size:
            raise PromptError(
                f"token_ids[{index}]: must be an id below {vocab_size}, got {short_repr(id)}"
            )
        ids.append(int(id))
    return ids


def _as_list(images: Sequence[ImageSource] | ImageSource) -> list[ImageSource]:
    """Return a list of images; a single image becomes a list of one."""
    if images is None:
        raise PromptError("images: must be a list of images, got None")
    several: Any = images if isinstance(images, list | tuple) else [images]
    with caller_code("images", PromptError):
        return list(several)


def _nested(texts: Sequence[str], images: Any) -> list[list[ImageSource]]:
    """Return the images of each text; images in one list are assigned to placeholders in order.

    Raises:
        PromptError: The number of lists differs from that of texts, or the number of images from
            that of placeholders.
    """
    lists = [isinstance(own, list | tuple) for own in _as_list(images)]
    placeholders = [text.count(IMAGE) for text in texts]
    if lists and not any(lists):
        if sum(placeholders) != len(lists):
            raise PromptError(
                f"images: must be one for each {IMAGE} of {len(texts)} texts, "
                f"wanted {sum(placeholders)}, got {len(lists)}"
            )
        rest = iter(_as_list(images))
        return [list(islice(rest, count)) for count in placeholders]
    if len(texts) != len(lists) or not texts or not all(lists):
        raise PromptError(
            f"images: must be one list for each of {len(texts)} texts, got {sum(lists)}"
        )
    return [_as_list(own) for own in images]
