"""Copying of a checkpoint's values to a model, with adapters, checks and quantization."""

from collections.abc import Collection
from itertools import groupby

import torch
from torch import Tensor

from idefics2_engine.checkpoint.lora import Adapter
from idefics2_engine.checkpoint.safetensors_header import StoredTensor
from idefics2_engine.checkpoint.tensor_mapping import hub_tensors, tensor_places
from idefics2_engine.device import Uploader
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import Linear, NF4Linear, SideBySide
from idefics2_engine.model.low_rank import LowRank
from idefics2_engine.model_files import printable_path
from idefics2_kernels import NF4Weight


class ParameterFiller:
    """Fills the weights of ``model``, one tensor of a checkpoint at a time.

    Args:
        model: Model with uninitialized weights, on its device. Dense values for its NF4 layers are
            quantized.
        adapter: LoRA adapter to merge into the dense values, or ``None``.
        beside: Names of the adapter's weights whose pairs are kept beside them instead.
        check_finite: Raise an error for NaN and infinity, both in the values as stored and after
            merging and rounding to the model's dtype.
        double_quant: Whether quantization also quantizes the absolute maxima.

    Attributes:
        places: The checkpoint's tensors by name, with the parameters of ``model``.
    """

    def __init__(
        self,
        model: Idefics2,
        adapter: Adapter | None,
        beside: Collection[str] = (),
        *,
        check_finite: bool,
        double_quant: bool,
    ) -> None:
        self.places = {place.name: place for place in tensor_places(model)}
        self._model = model
        self._adapter = adapter
        self._beside = beside
        self._check_finite = check_finite
        self._double_quant = double_quant
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._uploader = Uploader(model.device)
        # No file holds the rows that pad the vocabulary
        with torch.no_grad():
            for table in {model.text.embedding, model.lm_head}:
                table[model.config.text.vocab_size :] = 0.0

    @torch.no_grad()
    def fill(self, source: StoredTensor, value: Tensor | NF4Weight) -> None:
        """Write ``value``, read from ``source``, to its place in the model.

        Raises:
            CheckpointError: With ``check_finite``, a value is NaN or infinite.
        """
        place = self.places[source.name]
        layer = self._model.get_submodule(place.module)
        # A checkpoint may have its head in NF4, but the model's head is always dense
        if isinstance(value, NF4Weight) and not isinstance(layer, NF4Linear):
            value = self._model.ops.nf4_dequantize(value.to(self._model.device))
        value = self._prepared(source, value)
        if isinstance(layer, NF4Linear) and place.is_linear:
            self._model.set_nf4(place.module, self._quantized(source, value))
            return
        assert isinstance(value, Tensor)
        parameter = self._parameters[place.parameter]
        rows = parameter[place.first_row : place.first_row + place.shape[0]]
        self._uploader.copy(value, rows)
        if self._check_finite:
            require_finite(source, rows, f" in {self._model.dtype}")

    def _prepared(self, source: StoredTensor, value: Tensor | NF4Weight) -> Tensor | NF4Weight:
        """Check a dense ``value`` and merge the adapter; move an NF4 one to the model's device."""
        if isinstance(value, NF4Weight):
            return value.to(self._model.device)
        if self._check_finite:
            require_finite(source, value)
        if self._adapter is None:
            return value
        if source.name in self._beside:
            return self._adapter.replace(source.name, value)
        return self._adapter.merge(source.name, value, self._model.dtype, self._model.device)

    @torch.no_grad()
    def add_low_rank(self) -> None:
        """Give the layers the adapter's pairs that are kept beside their weights.

        Raises:
            CheckpointError: With ``check_finite``, a value is NaN or infinite in the model's dtype.
        """
        model = self._model
        linear = [place for place in hub_tensors(model.config) if place.is_linear]
        for module, places in groupby(linear, key=lambda place: place.module):
            changes = []
            for place in places:
                if self._adapter is not None and place.name in self._beside:
                    factors = self._adapter.factors(place.name, model.dtype, model.device)
                    if self._check_finite:
                        for source, factor in factors:
                            require_finite(source, factor, f" in {model.dtype}")
                    (_, a), (_, b) = factors
                    changes.append((place.first_row, a, b))
            if changes:
                layer = model.get_submodule(module)
                assert isinstance(layer, Linear | NF4Linear | SideBySide)
                layer.low_rank = LowRank.combine(layer.shape, changes)

    def _quantized(self, source: StoredTensor, value: Tensor | NF4Weight) -> NF4Weight:
        """Return ``value`` in NF4 on the model's device.

        A dense value is rounded to the model's dtype before it is quantized.
        """
        model = self._model
        if isinstance(value, Tensor):
            there = torch.empty(value.shape, dtype=model.dtype, device=model.device)
            value = self._uploader.copy(value, there)
        if self._check_finite:
            numbers = value if isinstance(value, Tensor) else model.ops.nf4_dequantize(value)
            require_finite(source, numbers, f" in {model.dtype}")
        if isinstance(value, NF4Weight):
            return value
        return model.ops.nf4_quantize(value, double_quant=self._double_quant)


def require_finite(source: StoredTensor, values: Tensor, where: str = "") -> None:
    """Check that ``values``, read from ``source``, are finite.

    ``where`` completes "must be finite" in the message.

    Raises:
        CheckpointError: There are NaNs or infinities. The message has their number and the first.
    """
    bad = ~torch.isfinite(values)
    count = int(bad.count_nonzero())
    if count:
        first = tuple(bad.nonzero()[0].tolist())
        raise CheckpointError(
            f"{printable_path(source.file)}: tensor {source.key!r} must be finite{where}, "
            f"got {count} values that are not, the first {values[first].item()} at {list(first)}"
        )
