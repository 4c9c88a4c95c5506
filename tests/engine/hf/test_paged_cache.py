"""The cache of transformers' generate loop, and tokens and logits that are computed with it."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from hf_models import LOOPED, MIXED, batch, build_own, build_peer, counted, worst_row
from idefics2_engine.hf import accelerate_model
from idefics2_engine.hf.paged_cache import PagedCache
from idefics2_engine.hf.paged_memory import PAGE, Memory
from idefics2_kernels import REFERENCE, TRITON, Ops
from oracle import CASES, TinyCase

BY_NAME = {case.name: case for case in CASES}
# Longer than a page with the answer, and padded on the left by more than a page
LONG = TinyCase("long", (((28, 42),), ()), (20, 90), text={"sliding_window": 40})
# The kernels are slow in the interpreter
TINY = TinyCase(
    "two-rows",
    ((), ()),
    (4, 21),
    text={"num_hidden_layers": 1, "sliding_window": 19},
)
LAYERS = 3


@pytest.fixture(scope="module")
def peer() -> Any:
    return build_peer(MIXED)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill allocated memory with NaN, so that no slot is read before it is written."""
    allocate = Memory.allocate

    def poisoned(like: Tensor, B: int, capacity: int) -> Memory:
        memory = allocate(like, B, capacity)
        for pages in (memory.key_pages, memory.value_pages):
            pages.fill_(torch.nan)
        return memory

    monkeypatch.setattr(Memory, "allocate", poisoned)


def patched(peer: Any, ops: Ops | None = REFERENCE) -> Any:
    """Return a copy of transformers' ``peer`` on ``ops``."""
    return accelerate_model(copy.deepcopy(peer), ops)


def text_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def four_steps(model: Any, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    """Return the logits (4 * B, vocabulary) of four tokens behind ``inputs``."""
    mask, logits = inputs["attention_mask"], []
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for token in (7, 11, 13, 17):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            ids = torch.full_like(mask[:, :1], token)
            logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits).flatten(0, 1)


class TestTokens:
    @pytest.mark.parametrize(
        "case",
        [
            MIXED,
            LONG,
            BY_NAME["row-without-image"],
            BY_NAME["no-image"],
            BY_NAME["short-window"],
            BY_NAME["no-window"],
            BY_NAME["multi-query"],
            BY_NAME["head-dims-72-96-128"],
        ],
        ids=lambda case: case.name,
    )
    def test_greedy_tokens_equal_transformers(self, case: TinyCase) -> None:
        inputs, peer, calls = batch(case), build_peer(case), Counter[str]()
        wanted = peer.generate(**inputs, **LOOPED)
        own = patched(peer, counted(REFERENCE, calls))
        assert torch.equal(own.generate(**inputs, **LOOPED), wanted)
        # The prompt makes the first token
        steps = LAYERS * (LOOPED["max_new_tokens"] - 1)
        assert calls["paged_attention"] == calls["rotary_and_cache"] == steps
        assert calls["rotary"] == calls["flash_attention"] - 2 * any(case.tiles) == LAYERS

    def test_tokens_of_the_kernels(self, device: torch.device) -> None:
        peer = build_peer(TINY).to(device)
        inputs = {name: tensor.to(device) for name, tensor in batch(TINY).items()}
        # Three queries a row, then one
        settings = LOOPED | {"max_new_tokens": 3, "prefill_chunk_size": 18}
        wanted = peer.generate(**inputs, **settings)
        calls: Counter[str] = Counter()
        own = patched(peer, counted(TRITON, calls)).to(device)
        assert torch.equal(own.generate(**inputs, **settings), wanted)
        assert calls["paged_attention"] == 3

    @pytest.mark.parametrize(
        "how",
        [
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 30},
            {"do_sample": True, "num_return_sequences": 2},
            {"prompt_lookup_num_tokens": 2, "max_new_tokens": 30},
            {"prefill_chunk_size": 8},
            {"return_dict_in_generate": True, "max_new_tokens": 30},
        ],
        ids=["beams", "more-beams", "sampled", "assisted", "chunks", "returned"],
    )
    def test_other_ways_to_generate(self, how: dict[str, Any], peer: Any) -> None:
        inputs, calls = batch(MIXED), Counter[str]()
        if "prompt_lookup_num_tokens" in how:
            # transformers assists one row only
            inputs = {name: tensor[:1] for name, tensor in inputs.items()}
        own = patched(peer, counted(REFERENCE, calls))
        results = []
        for model in (peer, own):
            torch.manual_seed(0)
            results.append(model.generate(**inputs, **LOOPED | how))
        if "return_dict_in_generate" in how:
            caches = [result.past_key_values for result in results]
            results = [result.sequences for result in results]
            assert [type(cache) for cache in caches] == [DynamicCache, PagedCache]
            # It is cropped to the tokens that were computed
            for theirs, ours in zip(*caches, strict=True):
                for wanted, got in zip(theirs[:2], ours[:2], strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
        assert torch.equal(*results)
        assert calls["paged_attention"] > LAYERS

    def test_an_assistant_generates_with_one(self, peer: Any) -> None:
        inputs = text_of({name: tensor[:1, -9:] for name, tensor in batch(MIXED).items()})
        own, calls = patched(peer), Counter[str]()
        # Tokens that are not accepted are taken back behind the window
        case = replace(TINY, text={"num_hidden_layers": 1, "sliding_window": 5})
        assistant = patched(build_peer(case), counted(REFERENCE, calls))
        wanted = peer.generate(**inputs, **LOOPED)
        got = own.generate(**inputs, **LOOPED, assistant_model=assistant)
        assert torch.equal(got, wanted)
        assert calls["paged_attention"] > 0

    @pytest.mark.long
    def test_a_compiled_model_keeps_other_memory(self) -> None:
        inputs, settings, peer = batch(TINY), LOOPED | {"max_new_tokens": 2}, build_peer(TINY)
        wanted = peer.generate(**inputs, **settings)
        own, compile = patched(peer), cast(Any, torch.compile)
        own.forward = compile(own.forward, backend="eager", fullgraph=True)
        assert torch.equal(own.generate(**inputs, **settings), wanted)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_steps_are_as_close_to_float64_as_transformers(
        self, dtype: torch.dtype, device: torch.device
    ) -> None:
        inputs = {name: tensor.to(device) for name, tensor in batch(MIXED).items()}
        peer = build_peer(MIXED, dtype).to(device)
        own = patched(peer, None).to(device)
        theirs = four_steps(peer, inputs, DynamicCache(config=peer.config))
        ours = four_steps(own, inputs, PagedCache(own.config))
        exact = four_steps(peer.double(), inputs, DynamicCache(config=peer.config))
        assert worst_row(ours, exact) <= 2 * (worst_row(theirs, exact) + torch.finfo(dtype).eps)

    @pytest.mark.parametrize(("window", "is_paged"), [(None, False), (3, True)])
    def test_tokens_behind_padding(self, window: int | None, is_paged: bool) -> None:
        """transformers' ``generate`` begins with padding then, so its first token has no meaning."""
        case = replace(BY_NAME["no-image"], text={"sliding_window": window})
        inputs, peer, calls = batch(case, "right"), build_peer(case), Counter[str]()
        own = patched(peer, counted(REFERENCE, calls))
        wanted = four_steps(peer, inputs, DynamicCache(config=peer.config))
        got = four_steps(own, inputs, PagedCache(own.config))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        # A short window sees the end of the padding alone, which is on the left of the tokens
        assert (calls["paged_attention"] > 0) == is_paged


class TestWhoHasOne:
    def cache_of(self, model: Any, **settings: Any) -> Any:
        inputs = text_of(batch(BY_NAME["no-image"]))
        settings = LOOPED | {"max_new_tokens": 2} | settings
        return model.generate(**inputs, **settings, return_dict_in_generate=True).past_key_values

    def test_generate_unless_another_was_asked_for(self, peer: Any) -> None:
        own = build_own(peer, MIXED)
        assert type(self.cache_of(own)) is PagedCache
        given = DynamicCache(config=own.config)
        assert self.cache_of(own, past_key_values=given) is given
        assert self.cache_of(own, use_cache=False) is None
        for name in ("dynamic", "static"):
            assert type(self.cache_of(own, cache_implementation=name)) is not PagedCache
        for name in ("sdpa", "eager"):
            own.set_attn_implementation(name)
            assert type(self.cache_of(own)) is DynamicCache

    # PEFT asks for a name that the newest transformers warns of
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_patched_models(self, peer: Any) -> None:
        wanted, calls = self.cache_of(peer), Counter[str]()
        assert type(wanted) is DynamicCache
        assert type(self.cache_of(patched(peer, counted(REFERENCE, calls)))) is PagedCache
        assert calls["paged_attention"] == LAYERS
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        wrapped: Any = peft.get_peft_model(copy.deepcopy(peer), config).eval()
        tokens = wrapped.generate(**batch(MIXED), **LOOPED)
        accelerate_model(wrapped, counted(REFERENCE, calls))
        assert type(self.cache_of(wrapped)) is PagedCache
        assert torch.equal(wrapped.generate(**batch(MIXED), **LOOPED), tokens)

    def test_not_where_gradients_may_be_wanted(self, peer: Any) -> None:
        own = build_own(peer, MIXED)
        decorated: Any = transformers.GenerationMixin.generate
        own.generate = decorated.__wrapped__.__get__(own)
        assert type(self.cache_of(own)) is DynamicCache


class TestCache:
    @pytest.fixture
    def own(self, peer: Any) -> Any:
        return patched(peer)

    def test_a_prompt_is_computed_once_for_several_answers(self, peer: Any, own: Any) -> None:
        inputs = text_of(batch(MIXED))
        first = {name: tensor[:, :20] for name, tensor in inputs.items()}
        first["position_ids"] = (first["attention_mask"].cumsum(1) - 1).clamp(min=0)
        prompt = PagedCache(own.config)
        with torch.no_grad():
            own(**first, past_key_values=prompt)
        wanted = peer.generate(**inputs, **LOOPED)
        for _ in range(2):
            cache = copy.deepcopy(prompt)
            assert torch.equal(own.generate(**inputs, **LOOPED, past_key_values=cache), wanted)
        assert prompt.get_seq_length() == 20

    def test_memory_moves_seldom_and_is_bounded_by_the_window(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        capacities: list[int] = []
        allocate = Memory.allocate

        def note(like: Tensor, B: int, capacity: int) -> Memory:
            capacities.append(capacity)
            return allocate(like, B, capacity)

        monkeypatch.setattr(Memory, "allocate", note)
        for window, wanted in ((None, [192, 320]), (40, [128] * 3)):
            case = replace(LONG, text={"sliding_window": window, "num_hidden_layers": 1})
            own = patched(build_peer(case))
            own.generate(**batch(case), **LOOPED | {"max_new_tokens": 180})
            assert capacities == wanted
            capacities.clear()

    def test_room_and_reach(self) -> None:
        config: Any = MIXED.config().text_config
        config.sliding_window = None
        tokens = torch.randn(1, 2, 1000, 16)
        whole = PagedCache(config)
        whole.update(tokens, tokens, 0)
        step = whole.begin_step(0, tokens[:, :, :1].transpose(1, 2), None)
        assert step is not None
        # A quarter more, in whole pages
        assert step.memory.capacity == 20 * PAGE
        assert whole.get_seq_length() == 1001
        # Kernels do not compile for each number of pages
        assert step.tables.block_table.shape == (1, 64)
        # While a crop may follow, all are kept, and as many are seen as before
        recording: Any = PagedCache(MIXED.config())
        recording.activate_past_recording()
        recording.update(tokens, tokens, 0)
        seen, _ = recording.update(tokens[:, :, :1], tokens[:, :, :1], 0)
        assert recording.layers[0].keys.shape[2] == 1001
        assert torch.equal(seen, torch.cat([tokens[:, :, -6:], tokens[:, :, :1]], 2))

    def test_methods_of_transformers(self, peer: Any, own: Any) -> None:
        inputs = text_of(batch(MIXED))

        def crop(cache: Any) -> None:
            cache.crop(-2)
            cache.crop(0)
            for layer in cache.layers:
                layer.record_past = False

        changes: list[Any] = [
            crop,
            lambda cache: cache.batch_repeat_interleave(2),
            lambda cache: cache.batch_select_indices(torch.tensor([1, 4, 5])),
            lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
            lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 1])),
            lambda cache: cache.batch_select_indices(slice(0, 2)),
            lambda cache: cache.reset(),
        ]
        caches: list[Any] = [DynamicCache(config=peer.config), PagedCache(own.config)]
        models = peer, own
        with torch.no_grad():
            for model, cache in zip(models, caches, strict=True):
                cache.activate_past_recording()
                model(**inputs, past_key_values=cache)
            for change in changes:
                for cache in caches:
                    change(cache)
                lengths = [cache.get_seq_length() for cache in caches]
                assert lengths[0] == lengths[1]
                rows = 3 if caches[0].layers[0].keys is None else len(caches[0].layers[0].keys)
                tokens = torch.full((rows, 1), 7)
                wanted, got = (
                    model(input_ids=tokens, past_key_values=cache).logits
                    for model, cache in zip(models, caches, strict=True)
                )
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    def test_places_follow_the_mask(self, peer: Any, own: Any) -> None:
        """A step is repeated after a crop, with padding and without."""
        ids, token = torch.arange(5, 9)[None], torch.tensor([[7]])
        padded = torch.tensor([[0, 0, 1, 1, 1]])
        results = []
        for model, cache in (
            (peer, DynamicCache(config=peer.config)),
            (own, PagedCache(own.config)),
        ):
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache)
                for mask in (padded, None, padded):
                    arguments = {"attention_mask": mask, "past_key_values": cache}
                    results.append(model(input_ids=token, **arguments).logits)
                    cache.crop(-1)
        torch.testing.assert_close(results[3:], results[:3], rtol=1e-4, atol=1e-4)
        assert (results[0] - results[1]).abs().max() > 0.1

    def test_a_crop_needs_what_the_window_left_behind(self, own: Any) -> None:
        cache = PagedCache(own.config)
        with torch.no_grad():
            own(input_ids=torch.arange(5, 25)[None], past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)

    def test_inference_mode_may_end(self, peer: Any, own: Any) -> None:
        logits = []
        for model, cache in (
            (peer, DynamicCache(config=peer.config)),
            (own, PagedCache(own.config)),
        ):
            with torch.inference_mode():
                model(input_ids=torch.arange(5, 25)[None], past_key_values=cache)
            with torch.no_grad():
                # transformers' own operations write as well
                for mask in (None, torch.ones(1, 1, 1, 7, dtype=torch.bool)):
                    out = model(
                        input_ids=torch.tensor([[7]]), attention_mask=mask, past_key_values=cache
                    )
                    logits.append(out.logits)
        torch.testing.assert_close(logits[2:], logits[:2], rtol=1e-4, atol=1e-4)

    def test_what_it_does_not_hold_is_refused(self, own: Any) -> None:
        cache = PagedCache(own.config)
        tokens = torch.arange(5, 25)[None]
        with pytest.raises(ValueError, match=r"past_key_values must be .*DynamicCache"):
            own(input_ids=tokens, past_key_values=cache)
        cache = PagedCache(own.config)
        with torch.no_grad():
            own(input_ids=tokens, past_key_values=cache)
            with pytest.raises(ValueError, match=r"\(3, 2, 6, 16\), got \(1, 2, 6, 16\)"):
                own(input_ids=tokens[:, :3].expand(3, -1), past_key_values=cache)
            with pytest.raises(ValueError, match="output_attentions"):
                own(input_ids=tokens[:, :1], past_key_values=cache, output_attentions=True)
            # transformers' attention refuses another dtype
            with pytest.raises(RuntimeError, match="dtype"):
                own.double()(input_ids=tokens[:, :1], past_key_values=cache)

    @pytest.mark.parametrize("how", ["eager", "sdpa", "dropout"])
    def test_another_attention_reads_the_same_memory(self, how: str) -> None:
        text = MIXED.text | {"attention_dropout": 0.5 * (how == "dropout")}
        case, calls = replace(MIXED, text=text), Counter[str]()
        peer, inputs = build_peer(case), text_of(batch(case))
        own = patched(peer, counted(REFERENCE, calls))
        for model in (peer, own):
            if how == "dropout":
                model.train()
            else:
                model.set_attn_implementation(how)
        torch.manual_seed(0)
        wanted = four_steps(peer, inputs, DynamicCache(config=peer.config))
        torch.manual_seed(0)
        got = four_steps(own, inputs, PagedCache(own.config))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert calls["rotary"] > calls["paged_attention"] == 0

    def test_a_mask_of_four_axes_is_transformers(self, peer: Any, own: Any) -> None:
        seen = torch.ones(1, 1, 1, 7, dtype=torch.bool)
        seen[..., 2:4] = False
        logits = []
        for model, cache in (
            (peer, DynamicCache(config=peer.config)),
            (own, PagedCache(own.config)),
        ):
            with torch.no_grad():
                model(input_ids=torch.arange(5, 25)[None], past_key_values=cache)
                plain = copy.deepcopy(cache)
                for mask, past in ((seen, cache), (None, plain)):
                    out = model(
                        input_ids=torch.tensor([[7]]), attention_mask=mask, past_key_values=past
                    )
                    logits.append(out.logits)
        torch.testing.assert_close(logits[2:], logits[:2], rtol=1e-4, atol=1e-4)
        assert (logits[0] - logits[1]).abs().max() > 0.1


def test_no_room_is_made_beyond_the_longest_answer(
    peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacities, allocate = [], Memory.allocate

    def counted_allocate(like: Tensor, B: int, capacity: int) -> Memory:
        capacities.append(capacity)
        return allocate(like, B, capacity)

    monkeypatch.setattr(Memory, "allocate", counted_allocate)
    inputs = text_of(batch(MIXED))
    inputs = {name: tensor[:, -60:] for name, tensor in inputs.items()}
    model = build_own(peer, MIXED)
    model.generation_backend = "transformers"
    model.generate(**inputs, **LOOPED | {"max_new_tokens": 2 * PAGE - 59})
    # The last token is not stored, so two pages hold all
    assert max(capacities) == 2 * PAGE


def test_more_tokens_than_expected_are_stored(peer: Any) -> None:
    inputs = text_of(batch(LONG))
    model = patched(build_peer(LONG))
    short, long = (PagedCache(model.config, max_length=most) for most in (3, None))
    assert torch.equal(four_steps(model, inputs, short), four_steps(model, inputs, long))


def test_pages_begin_at_every_slot() -> None:
    memory = Memory.allocate(torch.empty(1, 3, 1, 4), 2, 2 * PAGE)
    assert memory.capacity == 2 * PAGE
    torch.manual_seed(0)
    memory.keys.normal_()
    for row, slot in ((0, 0), (0, 5), (1, 0), (1, 37), (1, PAGE)):
        page = memory.key_pages[row * 3 * memory.capacity + slot]
        assert torch.equal(page, memory.keys[row, :, slot : slot + PAGE])
    # The last token has a page as well
    last = memory.key_pages[3 * memory.capacity + 2 * PAGE - 1]
    assert torch.equal(last[:, 0], memory.keys[1, :, -1])
