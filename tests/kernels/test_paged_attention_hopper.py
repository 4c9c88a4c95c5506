"""The paged attention kernel in Gluon on a CPU: it reads only the slots that a query sees."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gluon_emulator import barriers
from gluon_emulator.loader import load_module
from guarded import guarded_allocations
from idefics2_kernels.attention import paged_attention_hopper
from idefics2_kernels.attention.tiles import UNBOUNDED, base_two
from idefics2_kernels.catalog import CATALOG, Case
from idefics2_kernels.catalog import paged_attention as catalog
from idefics2_kernels.catalog.criterion import worst_error
from idefics2_kernels.reference import attention as reference

pytestmark = pytest.mark.long

SPEC = next(spec for spec in CATALOG if spec.name == "paged_attention")
MODULES = "gpu.gluon_compat", "attention.warp_specialized", "attention.paged_attention_hopper"
NAN = float("nan")


@pytest.fixture(scope="module")
def kernel() -> Any:
    return load_module(*MODULES)


@dataclass(frozen=True)
class Batch:
    """A batch: queries and keys of each sequence, and the heads."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    window: int | None = None
    D: int = 96
    H: int = 2
    H_KV: int = 1
    layout: str = "plain"
    q_layout: str = "plain"
    more: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> dict[str, Any]:
        """Draw inputs as the catalog does, with NaN in every slot that no query sees.

        These are the slots before the window in its first page, and all of page 0.
        """
        dims = {name: value for name, value in vars(self).items() if name != "more"} | self.more
        inputs = SPEC.make_inputs(Case("", dims), torch.device("cpu"))
        caches, table = (inputs["k_cache"], inputs["v_cache"]), inputs["block_table"]
        unused = int(caches[0].isnan().all(-1).all(-1).all(-1).nonzero()[0])
        for cache in caches:
            cache[[0, unused]] = cache[[unused, 0]]
        table[table == 0] = unused
        if self.window is not None:
            for S, T, pages in zip(self.queries, self.contexts, table, strict=True):
                first = T - S - self.window + 1
                if first > 0 and S > 0:
                    for cache in caches:
                        cache[pages[first // 64], :, : first % 64] = NAN
        return inputs


def run(
    kernel: Any,
    inputs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    programs: int = 3,
    counters: Tensor | None = None,
    **options: int,
) -> Tensor:
    """Run the kernel with a few programs, so that each has several tiles.

    Without ``counters`` the call has new ones.
    """
    own = torch.zeros(2, dtype=torch.int32) if counters is None else counters
    config = kernel.launch_config
    # Shared prefixes are for calls with one query per sequence
    others = ("window", "scale", "shared_prefixes")
    arguments = {name: value for name, value in inputs.items() if name not in others}
    window = inputs["window"]
    with monkeypatch.context() as patch, guarded_allocations():
        patch.setattr(kernel, "num_sms", lambda _device: programs)
        patch.setattr(kernel, "get_counters", lambda _count, _device: own)
        patch.setattr(kernel, "launch_config", lambda *sizes: replace(config(*sizes), **options))
        out = torch.empty(inputs["q"].shape, dtype=inputs["q"].dtype)
        kernel.paged_attention_hopper(
            **arguments,
            out=out,
            left=UNBOUNDED if window is None else window - 1,
            qk_scale=base_two(inputs["scale"], inputs["q"].shape[-1]),
        )
    return out


def error(out: Tensor, inputs: dict[str, Any]) -> float:
    """Return the worst row's error as a multiple of the allowed one.

    The reference gets 0 instead of NaN.
    """
    exact, same = (
        reference.paged_attention(
            **inputs
            | {name: inputs[name].to(dtype).nan_to_num(0.0) for name in ("q", "k_cache", "v_cache")}
        )
        for dtype in (torch.float64, torch.float16)
    )
    return worst_error(out, same, exact)


BATCHES: dict[str, Batch] = {
    # Contexts end at, before and after the edges of a page of 64 keys and a tile of 128
    "lengths": Batch((3, 0, 40, 1), (130, 70, 40, 65)),
    "whole-pages": Batch((64, 64, 2), (64, 128, 192), D=72),
    "whole-tiles": Batch((128, 256), (128, 512), D=128),
    "one-over": Batch((65, 129), (129, 257)),
    "one-under": Batch((63, 127), (127, 255), D=72),
    "one-query": Batch((1, 2), (300, 2), D=128),
    "long": Batch((130, 7), (700, 515), D=72),
    "no-queries": Batch((0, 5, 0), (100, 70, 0)),
    "without-keys": Batch((3, 300, 4), (2, 100, 0)),
    # Windows begin at, before and after the edges of pages and tiles
    "window-64": Batch((130, 3), (400, 64), window=64),
    "window-65": Batch((70,), (333,), window=65, D=128),
    "window-127": Batch((200, 1), (327, 128), window=127, D=72),
    "window-128": Batch((128, 64), (384, 192), window=128),
    "window-129": Batch((66, 66), (321, 129), window=129),
    "window-192": Batch((2, 100), (449, 448), window=192, D=128),
    "window-whole": Batch((20,), (100,), window=300),
    # The rows of a tile are queries times the heads of a pack
    "groups-of-1": Batch((150,), (200,), H=2, H_KV=2),
    "groups-of-3": Batch((70, 2), (100, 65), H=6, H_KV=2),
    "groups-of-4": Batch((40, 1, 33), (300, 200, 33), window=100, H=8, H_KV=2, D=128),
    "groups-of-12": Batch((20, 50), (20, 150), H=12, D=72),
    "groups-of-64": Batch((5, 2), (70, 10), H=64),
    # Layouts of the caches
    "fused": Batch((20, 33), (85, 200), layout="fused", H_KV=2, q_layout="sliced"),
    "slot-major": Batch((20, 33), (85, 200), layout="slot-major", H_KV=2, D=128, window=70),
    "mixed": Batch((20, 33), (85, 200), layout="mixed", H_KV=2, q_layout="transposed", D=72),
    "slack": Batch((9,), (80,), more={"slack": 300, "scale": 0.3, "spare": 4}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_kernel_in_the_emulator(name: str, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = BATCHES[name].inputs()
    assert error(run(kernel, inputs, monkeypatch), inputs) <= 1


@pytest.mark.parametrize(("buffers", "in_turn"), [*product((1, 2, 3), (0, 1))])
def test_buffers_and_turns_change_nothing(
    buffers: int, in_turn: int, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for D in (72, 128):
        inputs = Batch((70, 5), (400, 261), window=150, D=D, H=4).inputs()
        out = run(kernel, inputs, monkeypatch, BUFFERS=buffers, IN_TURN=in_turn)
        assert error(out, inputs) <= 1


@pytest.mark.parametrize("pack", [1, 2, 4])
def test_packs_change_nothing(pack: int, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Batch((70, 5), (400, 261), window=150, H=8, H_KV=2).inputs()
    assert error(run(kernel, inputs, monkeypatch, PACK=pack), inputs) <= 1


def test_forks_share_pages(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to one prompt share its pages; slots after their ends have other contents."""
    inputs = Batch((40, 40, 9), (260, 250, 200), D=72).inputs()
    table = inputs["block_table"]
    table[1, :3] = table[0, :3]
    # With 200 keys the third sequence uses 8 slots of its last page, and others use the rest
    table[2, :3] = table[0, :3]
    table[2, 3] = table[0, 3]
    # The engine writes 0 there
    table[:, 5:] = 0
    assert error(run(kernel, inputs, monkeypatch), inputs) <= 1


@pytest.mark.parametrize("programs", [1, 2, 7, 132])
def test_any_number_of_programs(
    programs: int, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Batch((150, 1, 0, 64), (200, 77, 5, 64), H=4, H_KV=2).inputs()
    assert error(run(kernel, inputs, monkeypatch, programs), inputs) <= 1


def test_unread_slots_are_nan(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that no query sees are NaN in all tests of this file.

    This test counts them, so that the NaNs cannot be lost unnoticed.
    """
    inputs = Batch((130, 3), (400, 333), window=100).inputs()
    for cache in (inputs["k_cache"], inputs["v_cache"]):
        seen = 130 + 99 + 3 + 99
        assert (~cache.isnan()).sum() == seen * cache.shape[1] * cache.shape[3]
    assert not run(kernel, inputs, monkeypatch).isnan().any()


@pytest.mark.parametrize(
    ("change", "left", "wanted"),
    [
        (lambda _q, _k: None, 63, True),
        (lambda _q, _k: None, 62, False),
        (lambda q, _k: {"q": q.float()}, 63, False),
        (lambda q, k: {"q": q[..., :64], "k_cache": k[..., :64]}, 63, False),
        (lambda _q, k: {"k_cache": k[:, :, :32]}, 63, False),
        (lambda q, _k: {"q": q.flatten()[1 : 1 + 4 * 2 * 72].view(4, 2, 72)}, 63, False),
        # The distance between pages is not a whole number of rows
        (
            lambda _q, k: {
                "k_cache": k.flatten()[:-64].as_strided((3, 1, 64, 72), (4616, 4608, 72, 1))
            },
            63,
            False,
        ),
    ],
)
def test_supported_inputs(
    change: Callable[[Tensor, Tensor], dict[str, Tensor] | None], left: int, wanted: bool
) -> None:
    q, k = torch.zeros(5, 2, 72).half(), torch.zeros(4, 1, 64, 72).half()
    call = {"q": q, "k_cache": k, "v_cache": k} | (change(q, k) or {})
    assert paged_attention_hopper.supports(**call, left=left) is wanted


def test_catalog_agrees_with_supported_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "on_hopper", lambda: False)
    assert not any(SPEC.only["plain"](case) for case in SPEC.cases)
    monkeypatch.setattr(catalog, "on_hopper", lambda: True)
    small = [c for c in SPEC.cases if sum(c.dims["queries"]) > 0 and sum(c.dims["contexts"]) < 2000]
    takes = []
    for case in small:
        inputs = SPEC.make_inputs(case, torch.device("cpu"))
        window = inputs["window"]
        takes.append(
            inputs["max_seqlen"] > 1
            and paged_attention_hopper.supports(
                inputs["q"],
                inputs["k_cache"],
                inputs["v_cache"],
                UNBOUNDED if window is None else window - 1,
            )
        )
    assert takes == [SPEC.only["plain"](case) for case in small]
    assert any(takes)
    assert not all(takes)


def test_tiles_are_taken_once_and_counters_are_reset(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs run one after another, so the first takes every tile not assigned in advance."""
    inputs = BATCHES["groups-of-4"].inputs()
    taken: list[int] = []
    take = kernel.take_tile

    def watched(*arguments: Any) -> int:
        index: int = take(*arguments)
        taken.append(index)
        return index

    monkeypatch.setattr(kernel, "take_tile", watched)
    counters = torch.zeros(2, dtype=torch.int32)
    out = run(kernel, inputs, monkeypatch, programs=2, counters=counters)
    assert error(out, inputs) <= 1
    tiles = 2 * sum(-(-4 * queries // 128) for queries in BATCHES["groups-of-4"].queries)
    assert taken == [*range(2, tiles), tiles, tiles + 1], "the last two find none"
    assert not counters.any()


# Changes to the source, each with the batch that must detect it
MUTATIONS: dict[str, tuple[str, str, str]] = {
    "slots without a key are read": ("gl.minimum(end_n - key, PAGE)", "PAGE", "one-over"),
    "one key too few": ("last_m + 1\n", "last_m\n", "lengths"),
    "rows before the window are read": (
        "(before > 0, before, rows)",
        "(before > 0, 0, rows)",
        "window-65",
    ),
    "a row of the window is not": (
        "(before > 0, before, rows)",
        "(before > 0, before + 1, rows)",
        "window-65",
    ),
    "ids of pages before the window": ("(before < PAGE) & (rows > 0)", "(rows > 0)", "window-129"),
    "ids of pages past the end": ("(before < PAGE) & (rows > 0)", "(before < PAGE)", "lengths"),
    "pages without a key are read": (
        "(before > 0, before, rows)",
        "(before > 0, before % PAGE, rows)",
        "window-129",
    ),
    "the same page twice": ("_page(start_n + PAGE,", "_page(start_n,", "long"),
    "table of the first sequence": (" + gl.cast(sequence, gl.int64) * stride_table", "", "lengths"),
    "values of the next tile": ("v_descs, before, v_rows", "v_descs, pages, v_rows", "long"),
    "keys' rows for values": ("v_descs, before, v_rows", "v_descs, before, k_rows", "mixed"),
    "pages in the wrong half": (".index(index * 2 + i)", ".index(index * 2 + 1 - i)", "long"),
    "columns before pages": (
        "(index * BLOCKS + block) * 2 + i",
        "(index * 2 + i) * BLOCKS + block",
        "whole-tiles",
    ),
    "half of a tile is waited for": (
        "BLOCK_N * (D_MAIN + D_REST) * 2",
        "PAGE * (D_MAIN + D_REST) * 2",
        "long",
    ),
    "buffers are written while they are read": (
        "mbarrier.wait(freed.index(step % BUFFERS), step // BUFFERS & 1 ^ 1)",
        "pass",
        "long",
    ),
    "positions without the context": (
        "return T - S + start_m, T - S + last_m",
        "return start_m, last_m",
        "lengths",
    ),
    "queries are the first keys": ("T = gl.load(context_lens_ptr + index)", "T = S", "long"),
    "heads of the first pack": (
        "pack * PACK, pack // packs",
        "pack // packs * packs * PACK, pack // packs",
        "groups-of-3",
    ),
    "a tile is left out": (
        "gl.num_programs(0) + gl.atomic_add(counters_ptr, 1)",
        "gl.num_programs(0) + 1 + gl.atomic_add(counters_ptr, 1)",
        "groups-of-4",
    ),
    "a row is a query": ("SliceLayout(1, QK))) // PACK", "SliceLayout(1, QK)))", "groups-of-4"),
    "second warpgroup's queries": ("start_m + c * (ROWS // PACK)", "start_m", "groups-of-4"),
    "no tile without a key": (
        "gl.maximum(gl.minimum(last_m + right + 1, T), 1)",
        "gl.minimum(last_m + right + 1, T)",
        "without-keys",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, batch = MUTATIONS[name]
    monkeypatch.setattr(barriers, "PATIENCE", 1.0)
    kernel, inputs = load_module(*MODULES, change=(old, new)), BATCHES[batch].inputs()
    try:
        out = run(kernel, inputs, monkeypatch)
    except (AssertionError, IndexError):
        # The kernel waited forever, or read past a tensor
        return
    assert not error(out, inputs) <= 1
