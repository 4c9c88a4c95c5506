"""LoRA and DoRA adapters in PEFT's format: what they change in a checkpoint's tensors.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. The second
file has two kinds of tensors. A pair A, B is added to a weight: W + B @ A * alpha / r (Hu et al.,
2021). With DoRA (Liu et al., 2024) the rows of the sum are scaled to trained magnitudes. A whole
tensor replaces one of the checkpoint's. The adapter's names are the checkpoint's with a prefix and,
in a module with a pair, another ending.
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

# PEFT nests the model in two modules with these names
_PREFIX = "base_model.model."
# PEFT moves the tensors of a module that has a pair below this name
_BASE = ".base_layer."
_PARTNERS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_B.weight": ".lora_A.weight",
    ".lora_embedding_A": ".lora_embedding_B",
    ".lora_embedding_B": ".lora_embedding_A",
}
_MAGNITUDE = ".lora_magnitude_vector"
_Change = TypeVar("_Change")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Pair:
    """The matrices of a low-rank change to the weight of ``module``: ``b @ a`` times a scale.

    The product is transposed for an embedding. ``end`` is the ending of the name of ``a``.
    """

    module: str
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    end: str

    @property
    def is_embedding(self) -> bool:
        return "embedding" in self.end

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: (out, in), or (in, out) for an embedding."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.is_embedding else shape

    def delta(self, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Compute the change on ``device`` in ``dtype``, in the shape of the weight."""
        product = (self.b.to(device, dtype) @ self.a.to(device, dtype)) * scale
        return product.T if self.is_embedding else product

    def scaled(self, weight: Tensor, magnitude: Tensor) -> Tensor:
        """Scale the rows of ``weight``, or the columns of an embedding, to norms of ``magnitude``.

        ``magnitude`` has a number for each row of b.
        """
        rows = weight.T if self.is_embedding else weight
        norms: Tensor = torch.linalg.norm(rows, dim=1)
        factors = magnitude.to(weight.device, weight.dtype) / norms
        return weight * (factors if self.is_embedding else factors[:, None])


class Adapter:
    """The changes that one adapter makes to the tensors of a checkpoint.

    Attributes:
        file: The adapter's safetensors file.
        stored: Headers of its tensors, by their names in the file.
        values: Values of its tensors on the CPU, by the same names.
    """

    def __init__(
        self,
        file: Path,
        config: AdapterConfig,
        stored: Mapping[str, StoredTensor],
        values: Mapping[str, Tensor],
    ) -> None:
        """Assign each tensor of ``file`` to the checkpoint's tensor that it changes.

        Raises:
            CheckpointError: A name lacks PEFT's prefix, a tensor of a pair has no partner, or two
                pairs or two whole tensors change the same tensor.
        """
        self.file = file
        self.stored = stored
        self.values = values
        self._config = config
        # Keys are the checkpoint's names
        self._whole: dict[str, Tensor] = {}
        self._pairs: dict[str, _Pair] = {}
        self._magnitudes: dict[str, Tensor] = {}
        # The whole tensors whose module must have a pair, because PEFT stores them below _BASE
        self._based: set[str] = set()
        for name in stored:
            self._sort(name)

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """Read the config and all tensors of the adapter in ``folder``, without merging them.

        Raises:
            ConfigError: The config is missing, malformed or not that of LoRA or DoRA.
            CheckpointError: The weights are missing, unreadable, pickled or not floats, or their
                names do not fit together.
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
        """Names of the checkpoint's tensors that this adapter changes."""
        return self._whole.keys() | self._pairs.keys()

    @property
    def paired(self) -> Set[str]:
        """Names of the checkpoint's tensors that have a pair."""
        return self._pairs.keys()

    @property
    def whole(self) -> Set[str]:
        """Names of the checkpoint's tensors that this adapter replaces."""
        return self._whole.keys()

    @property
    def is_dora(self) -> bool:
        """Whether pairs have magnitudes."""
        return self._config.dora

    def check(self, places: Mapping[str, HubTensor]) -> None:
        """Check that the adapter fits the checkpoint's tensors, which are ``places`` by name.

        Raises:
            CheckpointError: A change is for a tensor that is not in ``places``, or has another
                shape or rank. Or a pair for an embedding has the names for a linear layer, or the
                reverse. Or a whole tensor must be stored with a pair and is not, or the reverse. Or
                a tensor of ``modules_to_save`` or a magnitude of DoRA is missing.
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
        self._check_magnitudes()
        for name in places:
            if self._config.saves(name) and name not in self._whole:
                raise CheckpointError(
                    f"{self.file}: must hold {name!r:.200}, which is in modules_to_save of {ADAPTER_CONFIG}"
                )

    def merge(self, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the checkpoint's ``tensor`` called ``name`` with this adapter's change, if any.

        A pair is added on ``device`` in fp32, or in fp64 if ``tensor`` or ``dtype`` is fp64. The
        caller rounds the sum to ``dtype``. Without a pair, the dtype and device are unchanged.
        """
        tensor = self.replace(name, tensor)
        pair = self._pairs.get(name)
        if pair is None:
            return tensor
        wide = torch.promote_types(torch.promote_types(tensor.dtype, dtype), torch.float32)
        scale = self._config.scale(pair.module)
        total = tensor.to(device, wide) + pair.delta(scale, device, wide)
        magnitude = self._magnitudes.get(name)
        return total if magnitude is None else pair.scaled(total, magnitude)

    def replace(self, name: str, tensor: _Value) -> Tensor | _Value:
        """Return the whole tensor that replaces the checkpoint's ``tensor`` called ``name``, if any."""
        return self._whole.get(name, tensor)

    def factors(
        self, name: str, dtype: torch.dtype, device: torch.device
    ) -> list[tuple[StoredTensor, Tensor]]:
        """Return a (r, in) and b (out, r) of the tensor called ``name``, each after its header.

        They are rounded to ``dtype``, b after it was multiplied by the scale in fp32 or wider.
        """
        pair = self._pairs[name]
        wide = torch.promote_types(torch.promote_types(pair.b.dtype, dtype), torch.float32)
        b = pair.b.to(device, wide) * self._config.scale(pair.module)
        ends = (pair.end, _PARTNERS[pair.end])
        headers = [self.stored[f"{_PREFIX}{pair.module}{end}"] for end in ends]
        return list(zip(headers, (pair.a.to(device, dtype), b.to(dtype)), strict=True))

    def _sort(self, name: str) -> None:
        """Note what the tensor ``name`` changes. A pair is noted once, at its A."""
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
        if self.is_dora and inner.endswith(_MAGNITUDE):
            module = inner.removesuffix(_MAGNITUDE)
            self._magnitudes[f"{module}.weight"] = self.values[name]
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

    def _check_magnitudes(self) -> None:
        """Check that each pair of DoRA, and nothing else, has a magnitude of its b's rows."""
        if self.is_dora and (alone := self._pairs.keys() ^ self._magnitudes.keys()):
            raise CheckpointError(
                f"{self.file}: must hold a pair and a {_MAGNITUDE[1:]} for {min(alone)!r:.200}, got one of them"
            )
        for name, magnitude in self._magnitudes.items():
            shape = (self._pairs[name].b.shape[0],)
            if magnitude.shape != shape:
                raise CheckpointError(
                    f"{self.file}: the {_MAGNITUDE[1:]} for {name!r} must have shape {shape}, got {tuple(magnitude.shape)}"
                )

    def _check_shape(self, place: HubTensor, shape: tuple[int, ...]) -> None:
        if shape != place.shape:
            raise CheckpointError(
                f"{self.file}: must fit {place.name!r} of shape {place.shape}, got {shape}"
            )
