"""The paged KV cache: keys and values of every layer."""

import logging

import numpy as np
import torch
from torch import Tensor

from idefics2_engine.device import to_device
from idefics2_engine.model.config import TextConfig
from idefics2_engine.model.text import LayerCache

_logger = logging.getLogger(__name__)


class KVCache:
    """Keys and values of each layer, (pages, H_KV, page size, D) each.

    A page of one head is contiguous.
    """

    def __init__(
        self,
        config: TextConfig,
        num_pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)

        def allocate() -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.layers: list[LayerCache] = [(allocate(), allocate()) for _ in range(config.num_layers)]
        self.page_size = page_size
        _logger.info(
            "KV cache: %d tokens in %d pages, %.1f MB",
            num_pages * page_size,
            num_pages,
            self.num_bytes / 1e6,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def copy(self, pages: list[tuple[int, int]]) -> None:
        """Copy pages, each (from, to), in every layer; sources and targets are disjoint."""
        columns = [np.array(column, np.int64) for column in zip(*pages, strict=True)]
        sources, targets = to_device(columns, self.layers[0][0].device)
        for layer in self.layers:
            for tensor in layer:
                tensor[targets] = tensor[sources]
