"""Copying of a checkpoint's values to a model, with merging, checks and quantization."""

import torch
from torch import Tensor

from idefics2_engine.checkpoint.lora import Adapter
from idefics2_engine.checkpoint.safetensors_header import StoredTensor
from idefics2_engine.checkpoint.tensor_mapping import tensor_places
from idefics2_engine.device import Uploader
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.model.linear import NF4Linear
from idefics2_engine.model_files import printable_path
from idefics2_kernels import NF4Weight


class ParameterFiller:
    """Fills the weights of ``model``, one tensor of a checkpoint at a time.

    Args:
        model: Model with uninitialized weights, on its device. Dense values for its NF4 layers are
            quantized.
        adapter: LoRA adapter to merge into the dense values.
        check_finite: Raise an error for NaN and infinity, both in the values as stored and after
            merging and rounding to the model's dtype.
        double_quant: Whether quantization also quantizes the absolute maxima.

    Attributes:
        places: The checkpoint's tensors by name, with the parameters of ``model``.
    """

    def __init__(
        self, model: Idefics2, adapter: Adapter | None, *, check_finite: bool, double_quant: bool
    ) -> None:
        self.places = {place.name: place for place in tensor_places(model)}
        self._model = model
        self._adapter = adapter
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
        value = self._prepared(source, value)
        layer = self._model.get_submodule(place.module)
        if isinstance(layer, NF4Linear) and place.is_linear:
            self._model.set_nf4(place.module, self._quantized(source, value))
            return
        # A checkpoint may have its head in NF4, but the model's head is always dense
        if isinstance(value, NF4Weight):
            value = self._model.ops.nf4_dequantize(value)
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
        return self._adapter.merge(source.name, value, self._model.dtype, self._model.device)

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
