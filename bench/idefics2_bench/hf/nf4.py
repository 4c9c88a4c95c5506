"""Time the tokens of one sequence with layers in NF4, beside bitsandbytes in transformers."""

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from torch import nn

from idefics2_bench.hf.answers import ENGINE, own_answer, peer_answer
from idefics2_bench.hf.cases import Texts
from idefics2_bench.hf.generating import timed_answers
from idefics2_bench.hf.models import Models
from idefics2_bench.workloads import Counts
from idefics2_engine.jobs.plan.device_rates import PEER

Row = dict[str, Any]
_TIMES = ("ms", "ms_p20", "ms_p80", "peer_ms")


def nf4_obstacle() -> str | None:
    """Return why this case cannot run, or ``None`` if it can."""
    return None if find_spec("bitsandbytes") else "bitsandbytes is not installed"


def nf4_rows(models: Models, texts: Texts, rounds: int) -> list[Row]:
    """Time a new token of one sequence, its share of the prompt included."""
    # The models of the other cases keep their dense layers
    quantized = Models.on(models.packed, models.folder)
    _quantize(quantized)
    answers = {
        ENGINE: own_answer(ENGINE, quantized, texts),
        PEER: peer_answer(quantized, texts),
    }
    counts = Counts(new_tokens=texts.new_tokens)
    rows = timed_answers(answers, counts, models.device, rounds)
    quantized.own.engine.forget_weights()
    return [_of_a_token(row, texts.new_tokens) for row in rows]


def _of_a_token(row: Row, tokens: int) -> Row:
    shared = {name: row[name] / tokens for name in _TIMES if name in row}
    return {**row, **shared, **asdict(Counts(new_tokens=1))}


def _quantize(models: Models) -> None:
    """Replace the linear layers of both classes by layers of bitsandbytes on the same weights."""
    from idefics2_engine.hf import accelerate_model

    for name, layer in list(models.peer.named_modules()):
        # The head stays dense, as with BitsAndBytesConfig
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        made = _layer(layer)
        models.peer.set_submodule(name, made)
        other = _layer(layer, made.weight)
        models.own.set_submodule(name, other)
    accelerate_model(models.own, models.packed.ops)


def _layer(dense: nn.Linear, weight: Any = None) -> Any:
    """Return a layer like ``dense``, with ``weight`` or a quantized copy of its weight."""
    import bitsandbytes

    library: Any = bitsandbytes
    dtype = dense.weight.dtype
    made = library.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        dense.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    if weight is None:
        copied = dense.weight.detach().clone()
        quantized = library.nn.Params4bit(copied, requires_grad=False, quant_type="nf4")
        weight = quantized.to(dense.weight.device)
    made.weight, made.bias = weight, dense.bias
    return made
