"""The whole model on the kernels against the reference: each layer, each stage and the logits."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from demo_questions import first_questions
from idefics2_engine import LLM, SamplingParams
from idefics2_engine.checkpoint.tensor_mapping import hub_tensors
from idefics2_engine.images.tiling import Tile
from idefics2_engine.model.batch import ImageBatch, PagedView, TextBatch, cumulative
from idefics2_engine.model.config import ModelConfig
from idefics2_engine.model.idefics2 import Idefics2
from idefics2_engine.runtime.kv_cache import KVCache
from idefics2_kernels import REFERENCE, TRITON, NoGradientError, Ops
from idefics2_kernels.catalog.criterion import RATIO, worst_error
from oracle import CASES, TinyCase, image_batch
from paths import EIGHT_B

HALF = (torch.float16, torch.bfloat16)
TINY = {case.name: case for case in CASES}
# The dtype that the interpreter computes a case in. The kernels are tested in all of them.
INTERPRETED = {
    "mixed-batch": torch.float32,
    "head-dims-72-96-128": torch.bfloat16,
    "short-window": torch.float16,
    "row-without-image": torch.bfloat16,
}
CHOSEN = tuple(INTERPRETED)
PAGE = 16
LAYER = re.compile(r"(vision|connector\.perceiver|text)\.layers\.\d+")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    if not torch.cuda.is_available():
        yield
        return
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def random_model(
    config: ModelConfig, ops: Ops, device: torch.device, dtype: torch.dtype, std: float = 0.1
) -> Idefics2:
    """Build a model with the same weights in every dtype, rounded to bfloat16."""
    model = Idefics2(config, ops, device, torch.float32)
    model.init_weights(0, std)
    return model.to(torch.bfloat16).to(dtype)


def record_stages(model: Idefics2) -> dict[str, Tensor]:
    """Record the outputs of vision layers, connector and text layers."""
    stages: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            # A layer returns a branch and the residual that it belongs to
            stages[name] = output[0] + output[1] if isinstance(output, tuple) else output

        return hook

    for name, module in model.named_modules():
        if name in ("vision", "connector", "text") or (
            ".layers." in f"{name}." and name.rsplit(".", 1)[-1].isdigit()
        ):
            module.register_forward_hook(record(name))
    return stages


def paged_view(lengths: list[int], cached: list[int], pages: list[list[int]]) -> PagedView:
    """Build the batch of new tokens of sequences with ``cached`` tokens in their ``pages``."""
    slots = [
        own[p // PAGE] * PAGE + p % PAGE
        for length, begin, own in zip(lengths, cached, pages, strict=True)
        for p in range(begin, begin + length)
    ]
    widest = max(map(len, pages))
    return PagedView(
        slots=torch.tensor(slots),
        block_table=torch.tensor(
            [own + [2**31 - 1] * (widest - len(own)) for own in pages], dtype=torch.int32
        ),
        context_lens=torch.tensor(
            [a + b for a, b in zip(lengths, cached, strict=True)], dtype=torch.int32
        ),
    )


def run(model: Idefics2, case: TinyCase, device: torch.device, paged: bool) -> dict[str, Tensor]:
    """Return every stage and the logits; with ``paged`` in a chunk and two single tokens."""
    stages = record_stages(model)
    images = image_batch(case.make_tiles())
    with torch.no_grad():
        features = None if images is None else model.image_features(images.to(device))
        if not paged:
            stages["logits"] = model(TextBatch.from_ids(case.token_ids()).to(device), features)
            return stages
        ids = case.token_ids()
        config = model.config.text
        per_sequence = -(-max(map(len, ids)) // PAGE)
        pages = torch.randperm(per_sequence * len(ids), generator=torch.Generator().manual_seed(1))
        tables = pages.view(len(ids), per_sequence).tolist()
        cache = KVCache(config, per_sequence * len(ids) + 1, PAGE, device, model.dtype)
        for keys, values in cache.layers:
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
        cached = [0] * len(ids)
        is_image = model.config.image_token_id
        # Tokens of images that were computed already
        used = [0] * len(ids)
        offsets = [sum(row.count(is_image) for row in ids[:i]) for i in range(len(ids))]
        logits: list[list[Tensor]] = [[] for _ in ids]
        while any(done < len(row) for done, row in zip(cached, ids, strict=True)):
            live = [i for i, row in enumerate(ids) if cached[i] < len(row)]
            # The first chunk is most of a sequence, then single tokens follow
            counts = [max(1, len(ids[i]) - cached[i] - 2) for i in live]
            new = [ids[i][cached[i] : cached[i] + n] for i, n in zip(live, counts, strict=True)]
            batch = TextBatch(
                input_ids=torch.tensor([t for row in new for t in row]),
                positions=torch.cat(
                    [
                        torch.arange(cached[i], cached[i] + n)
                        for i, n in zip(live, counts, strict=True)
                    ]
                ),
                cu_seqlens=cumulative(counts),
                max_seqlen=max(counts),
                paged=paged_view(counts, [cached[i] for i in live], [tables[i] for i in live]),
            ).to(device)
            parts = []
            for i, row in zip(live, new, strict=True):
                here = row.count(is_image)
                if features is not None:
                    parts.append(features.flatten(0, 1)[offsets[i] + used[i] :][:here])
                used[i] += here
            rows = torch.cat(parts) if parts else None
            out = model(batch, rows if rows is not None and len(rows) else None, cache.layers)
            for i, part in zip(live, out.split(counts), strict=True):
                logits[i].append(part)
                cached[i] += len(part)
        return {"logits": torch.cat([part for own in logits for part in own])}


def layer_inputs(model: Idefics2, case: TinyCase, device: torch.device) -> dict[str, Any]:
    """Run ``model`` on a case; return the inputs of each of its layers, by the layer's name."""
    inputs: dict[str, Any] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, args, name=name: inputs.__setitem__(name, args)
        )
        for name, module in model.named_modules()
        if LAYER.fullmatch(name)
    ]
    run(model, case, device, paged=False)
    for hook in hooks:
        hook.remove()
    return inputs


def as_dtype(args: Any, dtype: torch.dtype) -> list[Any]:
    """Convert float64 tensors, the activations; tables and offsets are unchanged."""
    return [
        arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype is torch.float64 else arg
        for arg in args
    ]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
def test_every_layer_on_the_same_inputs(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Layers are compared one by one, because over many layers the reference's error is chance."""
    # The smallest case has every dtype
    if device.type == "cpu" and dtype is not INTERPRETED[name] and name != "row-without-image":
        pytest.skip("other cases cover this dtype in the interpreter")
    case = TINY[name]
    config = ModelConfig.from_dict(case.config().to_dict())
    exact = random_model(config, REFERENCE, device, torch.float64)
    ours, same = (random_model(config, ops, device, dtype) for ops in (TRITON, REFERENCE))
    inputs = layer_inputs(exact, case, device)
    stems = {layer.rsplit(".", 2)[0] for layer in inputs}
    assert stems == {"vision", "connector.perceiver", "text"}
    for layer, args in inputs.items():
        # The values are rounded to half precision, so all three start from the same numbers
        rounded = [
            arg.to(dtype).double()
            if isinstance(arg, Tensor) and arg.dtype is torch.float64
            else arg
            for arg in args
        ]
        with torch.no_grad():
            truth = exact.get_submodule(layer)(*rounded)
            results = [
                model.get_submodule(layer)(*as_dtype(rounded, dtype)) for model in (ours, same)
            ]
        for part, outputs in enumerate(zip(*results, truth, strict=True)):
            worst = worst_error(*outputs)
            assert worst <= 1, f"{layer}, output {part}: {worst:.2f} times the allowed error"


def chain_error(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> float:
    """Apply the criterion to the output of many layers: to each side's worst row.

    Errors are relative to the row's largest value. How far rounding errors carry one row through
    many layers is chance, for the reference as well. Each row of each layer is judged in
    ``test_every_layer_on_the_same_inputs``.
    """
    scale = exact.abs().amax(-1)
    ours, theirs = (
        ((each - exact).abs().amax(-1) / scale).max().item() for each in (actual, same_dtype)
    )
    return ours / (RATIO * (theirs + torch.finfo(actual.dtype).eps))


@pytest.mark.parametrize("paged", [False, True], ids=["packed", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
def test_logits(name: str, dtype: torch.dtype, paged: bool, device: torch.device) -> None:
    case = TINY[name]
    config = ModelConfig.from_dict(case.config().to_dict())
    if device.type == "cpu" and dtype is not (torch.float32 if paged else INTERPRETED[name]):
        pytest.skip("other cases cover this dtype in the interpreter")
    ours = run(random_model(config, TRITON, device, dtype), case, device, paged)
    same = run(random_model(config, REFERENCE, device, dtype), case, device, paged)
    exact = run(random_model(config, REFERENCE, device, torch.float64), case, device, False)
    worst = chain_error(ours["logits"], same["logits"], exact["logits"])
    assert worst <= 1, f"{worst:.2f} times the allowed error"


def test_kernel_model_refuses_partial_training(device: torch.device) -> None:
    case = next(c for c in CASES if c.name == "no-image")
    config = ModelConfig.from_dict(case.config().to_dict())
    model = random_model(config, TRITON, device, torch.float32)
    batch = TextBatch.from_ids(case.token_ids()).to(device)
    with pytest.raises(NoGradientError, match="'rms_norm' has no gradient"):
        model.loss(batch, batch.input_ids)
    model.requires_grad_(False)
    assert model.loss(batch, batch.input_ids).isfinite()


@pytest.mark.gpu
def test_demo_gives_the_same_tokens_on_the_kernels() -> None:
    chats = first_questions()
    params = SamplingParams(temperature=0.0, max_tokens=64)
    answers = [
        [
            output.outputs[0].token_ids
            for output in LLM(device="cuda", dtype="float32", kv_cache_tokens=8192, ops=ops).chat(
                chats, params
            )
        ]
        for ops in (REFERENCE, TRITON)
    ]
    assert answers[0] == answers[1]


def eight_b_batch() -> tuple[ImageBatch, TextBatch]:
    """Return an image and a prompt for the model's real shape."""
    config = ModelConfig.load(EIGHT_B)
    generator = torch.Generator().manual_seed(2)
    size = (56 * 14, 42 * 14)
    pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    images = ImageBatch.from_tiles([Tile(pixels.numpy(), 14, 70)])
    text = torch.randint(3, 32000, (40,), generator=generator).tolist()
    ids = [1, *text[:5], *[config.image_token_id] * config.perceiver.num_latents, *text[5:]]
    return images.to("cuda"), TextBatch.from_ids([ids]).to("cuda")


def eight_b_stages(
    ops: Ops, dtype: torch.dtype, batch: tuple[ImageBatch, TextBatch]
) -> dict[str, Tensor]:
    model = Idefics2(ModelConfig.load(EIGHT_B), ops, "cuda", torch.bfloat16)
    model.init_weights(0)
    model = model.to(dtype)
    stages = record_stages(model)
    images, text = batch
    with torch.inference_mode():
        stages["logits"] = model(text, model.image_features(images))
    return {name: value.float().cpu() for name, value in stages.items()}


@pytest.mark.gpu
def test_every_stage_of_the_real_shape() -> None:
    """Compare models with random weights in bfloat16; the reference in fp32 is the truth."""
    batch = eight_b_batch()
    exact = eight_b_stages(REFERENCE, torch.float32, batch)
    same = eight_b_stages(REFERENCE, torch.bfloat16, batch)
    stages = {**eight_b_stages(TRITON, torch.bfloat16, batch)}
    stages["transformers"] = transformers_logits(batch)
    wrong = {}
    for stage, value in stages.items():
        name = "logits" if stage == "transformers" else stage
        worst = chain_error(value.bfloat16(), same[name].bfloat16(), exact[name])
        if not worst <= 1:
            wrong[stage] = worst
    assert not wrong, "times the allowed error"


def transformers_logits(batch: tuple[ImageBatch, TextBatch]) -> Tensor:
    """Run transformers on the same weights, patches and position ids."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    images, text = batch
    values = json.loads((EIGHT_B / "config.json").read_text())
    values["perceiver_config"] = {**values.get("perceiver_config", {}), "rms_norm_eps": 1e-5}
    with torch.device("meta"):
        model: Any = Idefics2ForConditionalGeneration(Idefics2Config(**values))
    model = model.to(torch.bfloat16).to_empty(device="cuda")
    config = ModelConfig.load(EIGHT_B)
    source = Idefics2(config, REFERENCE, "cuda", torch.bfloat16)
    source.init_weights(0)
    parameters, targets = dict(source.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for place in hub_tensors(config):
            rows = parameters[place.parameter][place.first_row :][: place.shape[0]]
            targets[place.name].copy_(rows.view(place.shape))
    del source, parameters
    # to_empty left this buffer without values
    rotary = model.model.text_model.rotary_emb
    rotary.__init__(model.config.text_config)
    rotary.to("cuda")
    embeddings = model.model.vision_model.embeddings
    width = int(images.widths[0])
    height = images.position_ids.shape[0] // width
    side = config.vision.patch_size

    def embed(pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        embedded: Tensor = patches + embeddings.position_embedding(images.position_ids)[None]
        return embedded

    embeddings.forward = embed
    pixels = images.pixels.view(height * side, width * side, 3).permute(2, 0, 1)
    normal = ((pixels.float() / 255 - 0.5) / 0.5).bfloat16()[None, None]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=text.input_ids[None], pixel_values=normal).logits[0]
    return logits.float().cpu()
