"""The tensors of an NF4 weight in a checkpoint's files, as bitsandbytes writes them.

A weight (N, K) called ``name`` has ceil(N * K / 64) blocks and these tensors:

| tensor | dtype and shape | content |
|---|---|---|
| ``name`` | uint8 (ceil(N * K / 2), 1) | codes, two per byte |
| ``name.absmax`` | uint8 (blocks,) | absmax of each block |
| ``name.quant_map`` | fp32 (16,) | values of the codes |
| ``name.nested_absmax`` | fp32 (ceil(blocks / 256),) | scale of 256 absmaxes |
| ``name.nested_quant_map`` | fp32 (256,) | values of the bytes in ``absmax`` |
| ``name.quant_state.bitsandbytes__nf4`` | uint8 (bytes,) | JSON: shape, dtype, sizes, offset |

Without double quantization ``absmax`` is fp32, and there are no nested tensors and no offset.
``idefics2_kernels.nf4.nf4_weight`` has the formula.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from idefics2_engine.checkpoint.safetensors_header import StoredTensor
from idefics2_engine.errors import CheckpointError, ConfigError
from idefics2_engine.json_file import Section, parse_json
from idefics2_kernels import NF4Weight
from idefics2_kernels.nf4.nf4_weight import BLOCK, NESTED_BLOCK, nf4_code

_STATE = ".quant_state.bitsandbytes__nf4"
_PLAIN = ("", ".absmax", ".quant_map", _STATE)
_NESTED = (".nested_absmax", ".nested_quant_map")
# bitsandbytes writes states of less than 200 bytes
_MOST_STATE_BYTES = 4096
_CPU = torch.device("cpu")


def is_in_nf4(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Return whether the weight ``name`` is in NF4, which means that ``stored`` has its state."""
    return name + _STATE in stored


def tensor_names(name: str, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Return the names of the tensors that the NF4 weight ``name`` must have.

    These are four, or six with double quantization, which is recognized by a nested tensor in
    ``stored``.
    """
    is_nested = any(name + end in stored for end in _NESTED)
    return [name + end for end in (*_PLAIN, *(_NESTED if is_nested else ()))]


def weight_name(tensor: str) -> str:
    """Return the name of the weight that the tensor called ``tensor`` is a part of.

    It is ``tensor`` without an ending of the table in the module docstring, if it has one.
    """
    for end in (*_PLAIN[1:], *_NESTED):
        if tensor.endswith(end):
            return tensor.removesuffix(end)
    return tensor


def check_headers(name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> None:
    """Check that the tensors of the NF4 weight ``name`` fit a weight of ``shape``.

    ``stored`` must contain all of ``tensor_names``.

    Raises:
        CheckpointError: A tensor has another shape or dtype, or the state is too long.
    """
    numel = math.prod(shape)
    blocks = -(-numel // BLOCK)
    is_nested = name + _NESTED[0] in stored
    stored[name].check((-(-numel // 2), 1), "U8")
    stored[name + ".absmax"].check((blocks,), "U8" if is_nested else "F32")
    stored[name + ".quant_map"].check((16,), "F32")
    if is_nested:
        stored[name + ".nested_absmax"].check((-(-blocks // NESTED_BLOCK),), "F32")
        stored[name + ".nested_quant_map"].check((256,), "F32")
    state = stored[name + _STATE]
    if len(state.shape) != 1 or state.shape[0] > _MOST_STATE_BYTES:
        raise CheckpointError(
            f"{state.file}: tensor {state.name!r} must have at most {_MOST_STATE_BYTES} bytes in one row, "
            f"got shape {state.shape}"
        )
    state.check(state.shape, "U8")


def read_weight(
    source: StoredTensor, shape: tuple[int, ...], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> NF4Weight:
    """Build the NF4 weight called ``source.name`` from ``tensors`` by name, on the CPU.

    ``check_headers`` must have passed.

    Args:
        source: Header of the tensor of codes.
        shape: Shape of the weight.
        tensors: Values of all tensors of the weight.
        dtype: Dtype to compute in. The dtype in the state is not used.

    Raises:
        CheckpointError: The state is not a JSON object or describes another shape or format, or the
            values of the codes are not those of NF4.
    """
    name = source.name
    is_nested = name + _NESTED[0] in tensors
    offset = None
    try:
        state = _state(source.file, tensors[name + _STATE])
        _require(state, "quant_type", "nf4")
        _require(state, "blocksize", BLOCK)
        _require(state, "shape", list(shape))
        _require(state, "dtype", "bfloat16", "float16", "float32")
        if is_nested:
            _require(state, "nested_blocksize", NESTED_BLOCK)
            _require(state, "nested_dtype", "float32")
            offset = _offset(state)
    except ConfigError as error:
        raise CheckpointError(f"{source.file}: tensor {name + _STATE!r}: {error}") from None
    if not torch.equal(tensors[name + ".quant_map"], nf4_code(_CPU)):
        raise CheckpointError(
            f"{source.file}: tensor {name + '.quant_map'!r} must hold the 16 values of NF4, "
            f"got {tensors[name + '.quant_map'].tolist()}"
        )
    nested_absmax = tensors[name + ".nested_absmax"] if is_nested else None
    return NF4Weight(
        tensors[name].view(-1),
        tensors[name + ".absmax"],
        shape,
        dtype,
        None
        if offset is None or nested_absmax is None
        else offset.expand_as(nested_absmax).clone(),
        nested_absmax,
        tensors[name + ".nested_quant_map"] if is_nested else None,
    )


def weight_tensors(name: str, weight: NF4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of ``weight`` by the names in the module docstring, on the CPU.

    ``dtype`` is written to the state. bitsandbytes dequantizes to that dtype. All tensors are
    copies, because safetensors refuses to write tensors that share memory.
    """
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": weight.shape,
    }
    tensors = {
        "": weight.codes.view(-1, 1),
        ".absmax": weight.absmax,
        ".quant_map": nf4_code(_CPU),
    }
    if weight.offset is not None:
        assert weight.nested_absmax is not None
        assert weight.nested_code is not None
        tensors |= {
            ".nested_absmax": weight.nested_absmax,
            ".nested_quant_map": weight.nested_code,
        }
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(weight.offset[0]) if weight.numel else 0.0,
        }
    tensors[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name + end: tensor.to("cpu", copy=True) for end, tensor in tensors.items()}


def _state(file: Path, packed: Tensor) -> Section:
    """Parse the JSON in ``packed`` (bytes,) uint8."""
    return Section("quant_state", parse_json(bytes(packed.tolist()), file))


def _require(state: Section, key: str, *wanted: object) -> None:
    """Raise ``ConfigError`` unless the value is present and one of ``wanted``."""
    got = state.values.get(key)
    if got not in wanted:
        raise state.error(key, " or ".join(map(repr, wanted)), got)


def _offset(state: Section) -> Tensor:
    """Return the offset of the absmaxes, () fp32; raise ``ConfigError`` if it is not finite."""
    offset = state.values.get("nested_offset")
    value = torch.tensor(offset if type(offset) is float else math.nan, dtype=torch.float32)
    if not bool(value.isfinite()):
        raise state.error("nested_offset", "a number in fp32", offset)
    return value
