"""LoRA adapters in PEFT's format, merged into a checkpoint's tensors as these are loaded.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. What is merged is what the second file holds,
all of it; the config gives the scale: ``W + B @ A * alpha / r``. Tensors are named after the module that they belong to, and so
map to a checkpoint's names by their ends alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from idefics2_engine.adapter_config import AdapterConfig
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model_files import ADAPTER_CONFIG, is_there
from idefics2_engine.safetensors_file import FLOATS, StoredTensor, read_header
from idefics2_engine.weight_files import ADAPTER_WEIGHTS, pickles

_PREFIX = "base_model.model."  # PEFT's wrappers around the model
_PAIRS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora_embedding_A": ".lora_embedding_B",
    ".lora_embedding_B": ".lora_embedding_A",
}
_WHOLE = (".base_layer.weight", ".base_layer.bias", ".weight", ".bias")  # trained as they are


@dataclass(frozen=True)
class _LowRank:
    """``B @ A * scale``, to be added to a weight; transposed for an embedding."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float
    is_embedding: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.is_embedding else shape

    def delta(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        product = (self.b.to(device, dtype) @ self.a.to(device, dtype)) * self.scale
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
            CheckpointError: A tensor has no partner, no place, or another rank than the config says.
        """
        self.file = file
        self.stored = stored
        self.values = values
        self._replacements: dict[str, Tensor] = {}
        self._low_ranks: dict[str, _LowRank] = {}
        for name in stored:
            module, end = _split(file, name)
            if end in _PAIRS:
                partner = name.removesuffix(end) + _PAIRS[end]
                if partner not in stored:
                    raise CheckpointError(f"{file}: tensor {partner!r:.200} is missing")
                if "A" in end:
                    self._low_ranks[f"{module}.weight"] = self._pair(config, module, name, partner)
            elif module + end in self._replacements:
                raise CheckpointError(f"{file}: replaces {module + end!r:.200} twice")
            else:
                self._replacements[module + end] = values[name]

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
    def changed(self) -> dict[str, tuple[int, ...]]:
        """The names of the checkpoint's tensors that change, and the shapes of the changes."""
        whole = {name: tuple(tensor.shape) for name, tensor in self._replacements.items()}
        added = {name: change.shape for name, change in self._low_ranks.items()}
        return whole | added

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every change has its place among a checkpoint's tensors.

        Raises:
            CheckpointError: It is for a tensor that is not there or has another shape.
        """
        for name, shape in self.changed.items():
            if name not in shapes:
                raise CheckpointError(
                    f"{self.file}: changes {name!r:.200}, which is not part of this model"
                )
            if shape != shapes[name]:
                raise CheckpointError(
                    f"{self.file}: must fit {name!r} of shape {shapes[name]}, got {shape}"
                )

    def merge(self, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the checkpoint's ``tensor`` called ``name`` with this adapter's change, if there is one.

        The sum is formed on ``device`` in fp32, or wider where ``tensor`` or the ``dtype`` it is for are, and not rounded.
        """
        tensor = self._replacements.get(name, tensor)
        change = self._low_ranks.get(name)
        if change is None:
            return tensor
        wide = torch.promote_types(torch.promote_types(tensor.dtype, dtype), torch.float32)
        return tensor.to(device, wide) + change.delta(device, wide)

    def _pair(self, config: AdapterConfig, module: str, a_name: str, b_name: str) -> _LowRank:
        a, b = self.values[a_name], self.values[b_name]
        rank = config.rank(module)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise CheckpointError(
                f"{self.file}: {a_name!r:.200} and its partner must be (r, in) and (out, r) with r = {rank} "
                f"as in {ADAPTER_CONFIG}, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        is_embedding = a_name.endswith("_embedding_A")
        return _LowRank(a, b, config.scale(module), is_embedding)


def _split(file: Path, name: str) -> tuple[str, str]:
    """Cut a tensor's ``name`` into its module's and its end, one of ``_PAIRS``, ``.weight`` or ``.bias``."""
    if not name.startswith(_PREFIX):
        raise CheckpointError(
            f"{file}: tensor {name!r:.200} must begin with {_PREFIX!r}, as PEFT's do"
        )
    for end in (*_PAIRS, *_WHOLE):
        module = name.removeprefix(_PREFIX).removesuffix(end)
        if name.endswith(end) and ".lora_" not in module:
            return module, end.removeprefix(".base_layer")
    raise CheckpointError(f"{file}: tensor {name!r:.200} is no part of plain LoRA")
