"""LoRA adapters in PEFT's format, merged into a checkpoint's tensors during loading.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. All tensors
of the second file are merged, with the config's scale: ``W + B @ A * alpha / r``. Tensors are named
after their modules, so only the ends of names differ from the checkpoint's.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from idefics2_engine.checkpoint.lora_config import AdapterConfig
from idefics2_engine.checkpoint.safetensors_header import FLOATS, StoredTensor, read_header
from idefics2_engine.checkpoint.shards import ADAPTER_WEIGHTS, pickles
from idefics2_engine.checkpoint.tensor_mapping import HubTensor
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model_files import ADAPTER_CONFIG, is_there

# PEFT wraps the model in two modules with these names
_PREFIX = "base_model.model."
# A module with a pair has its own tensors below this name
_BASE = ".base_layer."
_PARTNERS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora_embedding_A": ".lora_embedding_B",
    ".lora_embedding_B": ".lora_embedding_A",
}
_Change = TypeVar("_Change")


@dataclass(frozen=True)
class _Pair:
    """``B @ A`` times a scale, to be added to the weight of ``module``.

    It is transposed for an embedding.
    """

    module: str
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    end: str  # of the first one's name

    @property
    def is_embedding(self) -> bool:
        return "embedding" in self.end

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.is_embedding else shape

    def delta(self, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        product = (self.b.to(device, dtype) @ self.a.to(device, dtype)) * scale
        return product.T if self.is_embedding else product


class Adapter:
    """The changes that one adapter makes, by the names of the checkpoint's tensors."""

    def __init__(
        self,
        file: Path,
        config: AdapterConfig,
        stored: Mapping[str, StoredTensor],
        values: Mapping[str, Tensor],
    ) -> None:
        """Sort the tensors ``stored`` in ``file``, with their ``values``, by what they change.

        Raises:
            CheckpointError: A tensor has no partner, or two of them claim one place.
        """
        self.file = file
        self.stored = stored
        self.values = values
        self._config = config
        self._whole: dict[str, Tensor] = {}
        self._pairs: dict[str, _Pair] = {}  # by the name of the weight
        self._based: set[str] = set()  # of the whole ones: those that a pair is added to
        for name in stored:
            self._sort(name)

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read the adapter in ``folder``.

        Raises:
            ConfigError: Its config is missing or describes something else than plain LoRA.
            CheckpointError: Its weights are missing, unreadable, pickled or contradict the config.
        """
        config = AdapterConfig.load(folder)
        file = folder / ADAPTER_WEIGHTS
        if not is_there(file):
            found = pickles(folder)
            raise CheckpointError(
                f"{folder}: holds no {ADAPTER_WEIGHTS}"
                + (f", only pickles ({', '.join(found)}), which can run code" if found else "")
            )
        stored = read_header(file)
        if not stored:
            raise CheckpointError(f"{file}: holds no tensors")
        for name, tensor in stored.items():
            if tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"{file}: tensor {name!r:.200} must be {', '.join(FLOATS)}, got {tensor.dtype}"
                )
        try:
            values = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from None
        return cls(file, config, stored, values)

    @property
    def changed(self) -> Set[str]:
        """The names of the checkpoint's tensors that change."""
        return self._whole.keys() | self._pairs.keys()

    def check(self, places: Mapping[str, HubTensor]) -> None:
        """Check that every change has its place among a checkpoint's tensors and none is missing.

        Raises:
            CheckpointError: A change is for a tensor that is not there, has another shape, rank or
                kind, or changes what a pair changes too; or a tensor of a module that was trained
                whole is lacking.
        """
        for name, tensor in self._whole.items():
            if name not in places:
                raise CheckpointError(
                    f"{self.file}: tensor {name!r:.200} is no part of plain LoRA, nor of this model"
                )
            has_pair = f"{name.rpartition('.')[0]}.weight" in self._pairs
            if has_pair != (name in self._based):
                wanted = "with" if name in self._based else "without"
                raise CheckpointError(
                    f"{self.file}: must hold {name!r} {wanted} a pair for its module"
                )
            self._check_shape(places[name], tuple(tensor.shape))
        for name, pair in self._pairs.items():
            if name not in places:
                raise CheckpointError(
                    f"{self.file}: changes {name!r:.200}, which is not part of this model"
                )
            self._check_pair(places[name], pair)
        for name in places:
            if self._config.saves(name) and name not in self._whole:
                raise CheckpointError(
                    f"{self.file}: must hold {name!r:.200}, which is in modules_to_save of {ADAPTER_CONFIG}"
                )

    def merge(self, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the checkpoint's ``tensor`` called ``name`` with this adapter's change, if any.

        The sum is formed on ``device`` in fp32, or wider where ``tensor`` or the ``dtype`` it is
        for are, and not rounded.
        """
        tensor = self._whole.get(name, tensor)
        pair = self._pairs.get(name)
        if pair is None:
            return tensor
        wide = torch.promote_types(torch.promote_types(tensor.dtype, dtype), torch.float32)
        scale = self._config.scale(pair.module)
        return tensor.to(device, wide) + pair.delta(scale, device, wide)

    def _sort(self, name: str) -> None:
        """Note what the tensor ``name`` changes; a pair is noted with its first."""
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{self.file}: tensor {name!r:.200} must begin with {_PREFIX!r}, as PEFT's do"
            )
        inner = name.removeprefix(_PREFIX)
        for end, partner in _PARTNERS.items():
            if inner.endswith(end):
                module = inner.removesuffix(end)
                other = f"{_PREFIX}{module}{partner}"
                if other not in self.stored:
                    raise CheckpointError(f"{self.file}: tensor {other!r:.200} is missing")
                if "A" in end:
                    pair = _Pair(module, self.values[name], self.values[other], end)
                    self._note(f"{module}.weight", pair, self._pairs)
                return
        module, base, own = inner.rpartition(_BASE)
        target = f"{module}.{own}" if base else own
        self._note(target, self.values[name], self._whole)
        if base:
            self._based.add(target)

    def _note(self, target: str, change: _Change, changes: dict[str, _Change]) -> None:
        if target in changes:
            raise CheckpointError(f"{self.file}: changes {target!r:.200} twice")
        changes[target] = change

    def _check_pair(self, place: HubTensor, pair: _Pair) -> None:
        if pair.is_embedding != place.is_embedding:
            raise CheckpointError(
                f"{self.file}: {place.name!r} must be changed by "
                f"{'lora_embedding_A' if place.is_embedding else 'lora_A.weight'}, got {pair.end!r}"
            )
        rank = self._config.rank(pair.module)
        a, b = pair.a.shape, pair.b.shape
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise CheckpointError(
                f"{self.file}: the pair for {place.name!r} must be (r, in) and (out, r) with r = {rank} "
                f"as in {ADAPTER_CONFIG}, got {tuple(a)} and {tuple(b)}"
            )
        self._check_shape(place, pair.shape)

    def _check_shape(self, place: HubTensor, shape: tuple[int, ...]) -> None:
        if shape != place.shape:
            raise CheckpointError(
                f"{self.file}: must fit {place.name!r} of shape {place.shape}, got {shape}"
            )
