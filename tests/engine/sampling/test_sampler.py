"""The sampler against a slow oracle, transformers' processors, and statistical tests."""

import math
import random
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from idefics2_engine.prompts.detokenizer import Detokenizer
from idefics2_engine.sampling.draw_batch import DrawBatch
from idefics2_engine.sampling.sampler import Choice, Sampler
from idefics2_engine.sampling_params import SamplingParams
from idefics2_engine.scheduling.sequence import Request, Sequence
from idefics2_kernels import REFERENCE, TRITON, Ops
from idefics2_kernels.reference import sampling as reference

V, IMAGE, EOS = 50, 49, 2
NEVER = float("-inf")
# The last one is not a token of this vocabulary
CONFIG_WORDS = [[IMAGE], [4, 5], [6, 6, 7], [60]]


class NoText:
    """A fake detokenizer."""

    def add_all(self, token_ids: list[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def make_sequence(
    prompt: list[int],
    answer: list[int],
    params: SamplingParams,
    *,
    seed: int = 0,
    words: list[list[int]] | None = None,
) -> Sequence:
    request = Request(
        request_id="0",
        prompt="",
        prompt_token_ids=prompt,
        images=(),
        params=params,
        seed=seed,
        max_tokens=len(answer) + 40,
        bad_words_ids=[tuple(word) for word in words or ()],
    )
    sequence = Sequence(request, 0, frozenset({EOS}), cast(Detokenizer, NoText()))
    sequence.token_ids.extend(answer)
    return sequence


def make_sampler(words: list[list[int]] = CONFIG_WORDS, **options: Any) -> Sampler:
    return Sampler(options.pop("ops", REFERENCE), words, IMAGE, lambda i: f"<{i}>", **options)


def edit_logits(sampler: Sampler, logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Return the logits that ``sampler`` passes to the draw."""
    seen: list[Tensor] = []

    def spy(logits: Tensor, *columns: Tensor, **options: Any) -> Tensor:
        seen.append(logits.clone())
        return reference.sample(logits, *columns, **options)

    sampler.ops = replace(REFERENCE, sample=spy)
    sampler.sample(logits.clone(), sequences)
    return seen[0]


def random_params(rng: random.Random, **fixed: Any) -> SamplingParams:
    """Draw parameters, most of them off, so that batches are mixed."""

    def maybe(off: Any, *on: Any) -> Any:
        return rng.choice([off, rng.choice(on)])

    ids = [rng.randrange(V - 1) for _ in range(6)]
    values: dict[str, Any] = {
        "temperature": maybe(0.0, 0.7, 1.0, 1.8),
        "top_p": maybe(1.0, 0.5, 0.9),
        "top_k": maybe(0, -1, 1, 5),
        "min_p": maybe(0.0, 0.02, 0.3),
        "repetition_penalty": maybe(1.0, 0.6, 1.3),
        "presence_penalty": maybe(0.0, -2.0, 0.8),
        "frequency_penalty": maybe(0.0, -0.7, 1.1),
        "logit_bias": maybe(None, {i: rng.uniform(-9, 9) for i in ids} | {IMAGE: 100.0}),
        "allowed_token_ids": maybe(None, [*ids, IMAGE, 10, 11, 12]),
        "min_tokens": maybe(0, 3),
        "stop_token_ids": maybe([], [8, 9]),
        "ignore_eos": maybe(False, True),
        "logprobs": maybe(None, 0, 1, 4, -1),
        "max_tokens": None,
    }
    return SamplingParams(**(values | fixed))


def random_batch(rng: random.Random, size: int, **fixed: Any) -> tuple[Tensor, list[Sequence]]:
    """Draw logits (size, V) and the sequences that they belong to.

    Some logits are -inf, and some are equal.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    logits = (torch.randn(size, V, generator=generator) * 3).round(decimals=1)
    logits[torch.rand(size, V, generator=generator) < 0.15] = NEVER
    # This token is always finite, and always allowed if tokens are named
    logits[:, 10] = 0.5
    sequences = []
    for _ in range(size):
        tokens = [4, 5, 6, 7, 13, 20, *range(20, 26)]
        prompt = [1, *rng.choices([*tokens, IMAGE, IMAGE], k=rng.randrange(8))]
        answer = rng.choices(tokens, k=rng.randrange(6))
        words = rng.choice([[], [[13], [20, 21], [7, 4, 5]]])
        params = random_params(rng, **fixed)
        sequences.append(
            make_sequence(prompt, answer, params, seed=rng.getrandbits(62), words=words)
        )
    return logits, sequences


def slow_edit(row: Tensor, sequence: Sequence, config_words: list[list[int]]) -> list[np.float32]:
    """Apply the parameters to one row, a token at a time, in the documented order."""
    params, request = sequence.request.params, sequence.request
    answer = sequence.token_ids[len(request.prompt_token_ids) :]
    out = [np.float32(value) for value in row.float().tolist()]
    for token in range(V):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            out[token] = np.float32(NEVER)
        for context, words in (
            (sequence.token_ids, config_words),
            (answer, request.bad_words_ids),
        ):
            for word in words:
                before = list(word[:-1])
                follows = not before or context[-len(before) :] == before
                if word[-1] == token and follows:
                    out[token] = np.float32(NEVER)
        ends = token in params.stop_token_ids or (token == EOS and not params.ignore_eos)
        if ends and len(answer) < params.min_tokens:
            out[token] = np.float32(NEVER)
        if params.logit_bias and token in params.logit_bias:
            out[token] += np.float32(params.logit_bias[token])
        if token in sequence.token_ids and token != IMAGE:
            penalty = np.float32(params.repetition_penalty)
            out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        out[token] -= np.float32(params.frequency_penalty) * np.float32(answer.count(token))
        if token in answer:
            out[token] -= np.float32(params.presence_penalty)
    return out


def slow_sample(row: Tensor, sequence: Sequence, min_p_first: bool) -> Choice:
    """Choose a token for one sequence alone."""
    params = sequence.request.params
    logits = torch.tensor([slow_edit(row, sequence, CONFIG_WORDS)])
    (token,) = reference.sample(
        logits,
        torch.tensor([params.temperature]),
        torch.tensor([max(params.top_k, 0)]),
        torch.tensor([params.top_p]),
        torch.tensor([params.min_p]),
        torch.tensor([sequence.seed]),
        torch.tensor([sequence.num_generated]),
        min_p_first=min_p_first,
    ).tolist()
    if params.logprobs is None:
        return Choice(token, None, logits.max().item())
    scores = slow_logprobs(row, token, params.logprobs)
    return Choice(token, cast(Any, scores), logits.max().item())


def slow_logprobs(row: Tensor, token: int, number: int) -> dict[int, tuple[float, int, str]]:
    order = sorted(range(V), key=lambda i: (-row[i].item(), i))
    logprobs = row.float().log_softmax(-1).tolist()
    wanted = [token, *order[: V if number == -1 else number]]
    return {i: (logprobs[i], order.index(i) + 1, f"<{i}>") for i in wanted}


def plain(choice: Choice) -> Choice:
    """Turn log probabilities into tuples, for comparison."""
    if choice.logprobs is None:
        return choice
    entries = {i: (e.logprob, e.rank, e.decoded_token) for i, e in choice.logprobs.items()}
    return choice._replace(logprobs=cast(Any, entries))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("min_p_first", [True, False], ids=["vllm", "hf"])
def test_mixed_batch_equals_the_slow_oracle_row_by_row(
    dtype: torch.dtype, min_p_first: bool
) -> None:
    rng = random.Random(f"{dtype} {min_p_first}")
    sampler = make_sampler(min_p_first=min_p_first)
    for _ in range(20):
        logits, sequences = random_batch(rng, 11)
        logits = logits.to(dtype)
        wanted = [
            slow_sample(row, sequence, min_p_first)
            for row, sequence in zip(logits, sequences, strict=True)
        ]
        got = [plain(choice) for choice in sampler.sample(logits.clone(), sequences)]
        assert [c.token_id for c in got] == [c.token_id for c in wanted]
        for have, want in zip(got, wanted, strict=True):
            if want.logprobs is None:
                assert have.logprobs is None
                continue
            assert have.logprobs is not None
            assert [*have.logprobs] == [*want.logprobs], "the token itself, then by rank"
            for token, entry in cast(Any, want.logprobs).items():
                mine = cast(Any, have.logprobs[token])
                assert mine[1:] == entry[1:]
                assert mine[0] == pytest.approx(entry[0], abs=2e-6)


@pytest.mark.parametrize(
    "fixed",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.5},
        {"logit_bias": {3: 2.5, 10: -100.0, IMAGE: 100}},
        {"allowed_token_ids": [10, 3, 3, IMAGE]},
        {"min_tokens": 5, "stop_token_ids": [10, 11]},
        {},
    ],
    ids=lambda fixed: next(iter(fixed), "bad_words"),
)
def test_each_parameter_alone_changes_the_logits_as_documented(fixed: dict[str, Any]) -> None:
    rng = random.Random(str(fixed))
    logits, sequences = random_batch(rng, 16)
    for sequence in sequences:
        sequence.request.params = SamplingParams(max_tokens=None, **fixed)
    got = edit_logits(make_sampler(), logits, sequences)
    wanted = torch.tensor(
        np.array([slow_edit(r, s, CONFIG_WORDS) for r, s in zip(logits, sequences, strict=True)])
    )
    assert torch.equal(got, wanted)
    assert not torch.equal(got, logits)
    assert (got[:, IMAGE] == NEVER).all()


def test_histories_follow_growing_answers() -> None:
    """The lists are kept from step to step, and must always equal newly built ones."""
    rng = random.Random(5)
    sampler = make_sampler()
    _, sequences = random_batch(rng, 6, repetition_penalty=1.4, frequency_penalty=0.5)
    for step in range(30):
        if step == 10:
            sequences = sequences[3:] + random_batch(rng, 3, presence_penalty=1.0)[1]
        rows = torch.randn(len(sequences), V)
        assert torch.equal(
            edit_logits(sampler, rows, sequences), edit_logits(make_sampler(), rows, sequences)
        )
        for sequence, choice in zip(
            sequences, sampler.sample(rows.clone(), sequences), strict=True
        ):
            sequence.token_ids.append(choice.token_id)


def test_deleted_sequences_are_not_kept() -> None:
    sampler = make_sampler([[IMAGE], [60]])
    logits, sequences = random_batch(random.Random(0), 5, repetition_penalty=1.1)
    sequences.append(make_sequence([1], [6], SamplingParams()))
    sampler.sample(torch.cat([logits, logits[:1]]), sequences)
    assert sampler.num_sequences == 5, "nothing is kept of sequences without edits of their own"
    del sequences
    assert sampler.num_sequences == 0


def test_edits_equal_transformers() -> None:
    rng = random.Random(1)
    for penalty in (0.5, 1.2, 3.0):
        logits = torch.randn(9, V) * 3
        bias = {3: 2.0, 7: -4.5}
        params = SamplingParams(repetition_penalty=penalty, min_tokens=4, logit_bias=bias)
        words = [[4, 5], [6, 6, 7], [30], [5]]
        prompts = [[1, *rng.choices([4, 6, 8, 20], k=5)] for _ in logits]
        answers = [rng.choices([4, 6, 21], k=4 if i % 2 else 3) for i in range(len(logits))]
        sequences = [
            make_sequence(prompt, answer, params)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        got = edit_logits(make_sampler(words), logits, sequences)
        for row, sequence, have in zip(logits, sequences, got, strict=True):
            processors = LogitsProcessorList(
                [
                    SequenceBiasLogitsProcessor(
                        [[[token], value] for token, value in bias.items()]
                    ),
                    RepetitionPenaltyLogitsProcessor(penalty),
                    NoBadWordsLogitsProcessor(words, eos_token_id=EOS),
                    MinNewTokensLengthLogitsProcessor(6, 4, EOS, device="cpu"),
                ]
            )
            context = torch.tensor([sequence.token_ids], dtype=torch.long)
            wanted = processors(cast(Any, context), row[None].clone())[0]
            assert torch.equal(have, wanted)


FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 0.85, "min_p": 0.12},
    {"temperature": 1.2, "top_k": 6, "top_p": 0.9, "min_p": 0.2},
]


@pytest.mark.parametrize("options", FILTERS, ids=lambda options: "-".join(options))
def test_remaining_tokens_equal_transformers(options: dict[str, Any]) -> None:
    """Every token that transformers keeps is drawn, and no other, in its order of filters."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in options:
            warpers.append(warper(options[name]))
    generator = torch.Generator().manual_seed(len(options))
    for _ in range(4):
        logits = torch.randn(1, 14, generator=generator) * 1.2
        scores = warpers(cast(Any, None), cast(Any, logits.clone()))[0]
        kept = {i for i, value in enumerate(scores.tolist()) if value > NEVER}
        assert scores.softmax(-1)[list(kept)].min() > 0.004, "each must be drawn in 6000 tries"
        drawn = draw_many(logits[0], 6000, SamplingParams(**options), min_p_first=False)
        assert set(drawn) == kept


def test_two_orders_differ_as_documented() -> None:
    logits = torch.tensor([0.5, 0.2, 0.12, 0.1, 0.08]).log()
    params = SamplingParams(top_p=0.8, min_p=0.22)
    # In vLLM's order min-p leaves 0.5, 0.2 and 0.12, and the first two of them have a share of
    # 0.85. In transformers' order top-p leaves the first three of all, and min-p removes none of
    # them.
    assert set(draw_many(logits, 4000, params, min_p_first=True)) == {0, 1}
    assert set(draw_many(logits, 4000, params, min_p_first=False)) == {0, 1, 2}


def draw_many(logits: Tensor, number: int, params: SamplingParams, **options: Any) -> Counter[int]:
    """Count the tokens drawn by one batch of ``number`` equal rows, each with its own seed."""
    first = make_sequence([1], [], params)
    sequences = [
        Sequence(first.request, i, frozenset({EOS}), cast(Detokenizer, NoText()))
        for i in range(number)
    ]
    rows = logits.expand(number, -1).clone()
    return Counter(c.token_id for c in make_sampler([], **options).sample(rows, sequences))


def draw_with_seeds(logits: Tensor, number: int, params: SamplingParams) -> Counter[int]:
    """Count the tokens drawn with ``number`` seeds from the row that the sampler draws from."""
    rows: list[tuple[Any, ...]] = []

    def spy(*arguments: Any, **options: Any) -> Tensor:
        rows.append(arguments)
        return reference.sample(*arguments, **options)

    sampler = make_sampler([], ops=replace(REFERENCE, sample=spy))
    sampler.sample(logits[None].clone(), [make_sequence([1], [], params)])
    ((row, temperature, top_k, top_p, min_p, seed, index),) = rows
    assert seed.tolist() == [0], "the seed of the first sequence, which each further one adds to"
    drawn = reference.sample(
        row.expand(number, -1),
        temperature.expand(number),
        top_k.expand(number),
        top_p.expand(number),
        min_p.expand(number),
        torch.arange(number),
        index.expand(number),
    )
    return Counter(drawn.tolist())


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}],
    ids=["plain", "filtered"],
)
def test_200000_draws_have_the_expected_distribution(options: dict[str, Any]) -> None:
    logits = torch.linspace(2.0, -3.0, 24, dtype=torch.float64)
    params = SamplingParams(**options)
    wanted = logits.clone()
    # The prompt's token
    wanted[1] /= params.repetition_penalty
    scores = wanted / params.temperature
    probabilities = scores.softmax(-1)
    keep = probabilities >= params.min_p * probabilities.max()
    probabilities = torch.where(keep, probabilities, 0.0)
    probabilities /= probabilities.sum()
    descending, ids = probabilities.sort(descending=True)
    before = descending.cumsum(0) - descending
    probabilities[ids[before >= params.top_p]] = 0.0
    probabilities /= probabilities.sum()

    number = 200_000
    drawn = draw_with_seeds(logits.float(), number, params)
    expected = {i: p * number for i, p in enumerate(probabilities.tolist()) if p > 0}
    assert set(drawn) == set(expected)
    statistic = sum((drawn[i] - count) ** 2 / count for i, count in expected.items())
    freedom = len(expected) - 1
    # By Wilson and Hilferty, the cube root of the statistic is nearly normal. An excess of 4
    # deviations has a probability of 1 in 30,000.
    spread = math.sqrt(2 / (9 * freedom))
    assert abs((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) < 4 * spread


def test_choice_of_a_row_does_not_depend_on_other_rows() -> None:
    rng = random.Random(8)
    for dtype in (torch.float32, torch.bfloat16):
        logits, sequences = random_batch(rng, 24)
        logits = logits.to(dtype)
        together = make_sampler().sample(logits.clone(), sequences)
        order = rng.sample(range(24), 24)
        shuffled = make_sampler().sample(logits[order], [sequences[i] for i in order])
        assert shuffled == [together[i] for i in order]
        for i in range(24):
            assert make_sampler().sample(logits[i : i + 1].clone(), [sequences[i]]) == [together[i]]


def test_random_stream_is_keyed_by_seed_and_token_index() -> None:
    flat = torch.zeros(1, V)

    def drawn(seed: int, prompt: list[int], answer: list[int]) -> int:
        sequence = make_sequence(prompt, answer, SamplingParams(), seed=seed)
        return make_sampler([]).sample(flat.clone(), [sequence])[0].token_id

    assert drawn(7, [1], [9, 9]) == drawn(7, [1, 2, 3], [4, 30])
    assert len({drawn(7, [1], [9] * index) for index in range(12)}) > 6
    assert len({drawn(seed, [1], []) for seed in range(12)}) > 6
    uniforms = reference.philox_uniform(torch.tensor([7]), torch.tensor([2]))
    assert drawn(7, [1], [9, 9]) == int(uniforms.item() * V)


def test_greedy_chooses_the_first_of_equal_maxima() -> None:
    logits = torch.full((2, V), -1.0)
    logits[:, [17, 11, 30]] = 3.0
    greedy = make_sequence([1], [], SamplingParams(temperature=0.0, logprobs=3))
    other = make_sequence([1], [], SamplingParams(temperature=1.0))
    for sequences in ([greedy], [greedy, other]):
        choice = make_sampler().sample(logits[: len(sequences)].clone(), sequences)[0]
        assert choice.token_id == 11
        assert choice.logprobs is not None
        assert [(i, e.rank) for i, e in choice.logprobs.items()] == [(11, 1), (17, 2), (30, 3)]


def test_log_probabilities_use_the_unedited_logits() -> None:
    logits = torch.randn(1, V)
    params = SamplingParams(
        temperature=0.0, allowed_token_ids=[10], logit_bias={10: -50.0}, logprobs=2
    )
    ((token, logprobs, _),) = make_sampler().sample(
        logits.clone(), [make_sequence([1], [10], params)]
    )
    assert token == 10
    assert logprobs is not None
    assert logprobs[10].logprob == pytest.approx(logits.log_softmax(-1)[0, 10].item(), abs=1e-6)
    assert logprobs[10].rank == 1 + int((logits > logits[0, 10]).sum())
    assert [*logprobs] == [10, *logits.topk(2).indices[0].tolist()]


# Changes to logits: {row: (tokens, new value)}
BROKEN: dict[int, tuple[int | slice, float]] = {
    1: (7, math.nan),
    3: (slice(None), math.nan),
    # This token is barred in every row
    4: (IMAGE, math.nan),
    6: (7, math.inf),
    7: (IMAGE, math.inf),
    9: (slice(None), NEVER),
    # This row may choose only among these
    10: (slice(10, 13), NEVER),
    # This row may not choose this token
    12: (20, math.nan),
}


@pytest.mark.parametrize(
    ("ops", "dtype"),
    [(REFERENCE, torch.float32), (REFERENCE, torch.float16), (TRITON, torch.float32)],
    ids=["reference", "reference-half", "triton"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
# NumPy warns in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_rows_that_cannot_be_sampled_are_reported(
    ops: Ops, temperature: float, dtype: torch.dtype, device: torch.device
) -> None:
    params = SamplingParams(
        temperature=temperature, logprobs=2, top_k=9, top_p=0.9, min_p=0.01, logit_bias={3: 1.0}
    )
    sequences = [make_sequence([1, 5], [6], params, seed=row) for row in range(14)]
    for row in (10, 11, 12):
        only = replace(params, allowed_token_ids=[10, 11, 12])
        sequences[row] = make_sequence([1, 5], [6], only, seed=row)
    logits = torch.randn(14, V).to(device, dtype)
    # Tokens that are never drawn are legal
    logits[0, 3:20] = NEVER
    logits[11, 11:] = NEVER
    whole = make_sampler(ops=ops).sample(logits.clone(), sequences)
    assert all(choice.is_finite for choice in whole)
    for row, (places, value) in BROKEN.items():
        logits[row, places] = value
    choices = make_sampler(ops=ops).sample(logits, sequences)
    for row, (choice, wanted) in enumerate(zip(choices, whole, strict=True)):
        assert choice.is_finite == (row not in BROKEN)
        assert 0 <= choice.token_id < V, "the next step may look it up before it is refused"
        assert row in BROKEN or choice == wanted


def test_greedy_choice_and_its_logit_are_one_operation() -> None:
    logits = torch.randn(4, V)
    sequences = [make_sequence([1], [3], SamplingParams(temperature=0.0)) for _ in range(4)]
    with Operations() as operations:
        make_sampler().draw(logits, DrawBatch.of(sequences))
    over_all = [n for n in operations.names if "max" in n or "isnan" in n or "isfinite" in n]
    assert over_all == ["aten.max.dim"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_prompt_scores_refuse_logits_that_are_not_finite(wrong: float) -> None:
    logits = torch.randn(300, V)
    # This is legal, and so is its log probability
    logits[:, 4] = NEVER
    assert make_sampler().prompt_logprobs(logits, [4] * 300, 2)[0][4].logprob == NEVER
    logits[270, 7] = wrong
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        make_sampler().prompt_logprobs(logits, [1] * 300, 2)
    logits[270] = NEVER
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        make_sampler().prompt_logprobs(logits, [1] * 300, 2)


def test_prompt_log_probabilities() -> None:
    sampler = make_sampler()
    # There are more rows than are scored at once
    logits = torch.randn(700, V).to(torch.bfloat16)
    logits[5, :20] = 1.5
    tokens = [int(i) for i in torch.randint(0, V, (700,))]
    for number in (0, 3, -1):
        got = sampler.prompt_logprobs(logits, tokens, number)
        assert len(got) == 700
        for i in (0, 5, 255, 256, 699):
            wanted = slow_logprobs(logits[i], tokens[i], number)
            assert [*got[i]] == [*wanted]
            for token, (logprob, rank, text) in wanted.items():
                entry = got[i][token]
                assert (entry.rank, entry.decoded_token) == (rank, text)
                assert entry.logprob == pytest.approx(logprob, abs=2e-6)
    assert got[300:302] == sampler.prompt_logprobs(logits[300:302], tokens[300:302], -1)
    assert sampler.prompt_logprobs(logits[:0], [], 5) == []
    with pytest.raises(ValueError, match="token_ids must be as many as logits 700, got 699"):
        sampler.prompt_logprobs(logits, tokens[1:], 5)


class Operations(TorchDispatchMode):
    """Records the names of operations, and the size of the largest tensor they create."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(out, Tensor) and all(out is not argument for argument in args):
            self.largest = max(self.largest, out.numel())
        return out


def everything(size: int) -> list[Sequence]:
    """Build sequences that use every option."""
    params = SamplingParams(
        temperature=0.8,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={3: 1.0},
        allowed_token_ids=list(range(30)),
        min_tokens=9,
        logprobs=4,
    )
    return [make_sequence([1, 5], [6, 6], params, words=[[8]]) for _ in range(size)]


def test_number_of_operations_does_not_depend_on_the_number_of_rows() -> None:
    counts = []
    for size in (2, 40):
        sampler, sequences = make_sampler(), everything(size)
        with Operations() as operations:
            sampler.draw(torch.randn(size, V), DrawBatch.of(sequences))
        counts.append(Counter(operations.names))
    # Joining lists on the host is not a launch, and its work grows with the number of lists
    assert counts[0] == counts[1]


def test_draw_reads_nothing_back() -> None:
    """A meta tensor has no values, so reading one fails."""
    sequences = everything(5)
    drawn = make_sampler().draw(torch.randn(5, V, device="meta"), DrawBatch.of(sequences))
    assert drawn.token_ids.device.type == "meta"
    assert drawn.scores is not None
    assert drawn.scores.logprobs.shape == (5, 5)


def test_greedy_rows_copy_no_logits() -> None:
    wide = 4096
    greedy = [make_sequence([1], [3], SamplingParams(temperature=0.0)) for _ in range(8)]
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(8, wide).to(dtype)
        with Operations() as operations:
            make_sampler().sample(logits, greedy)
        assert operations.largest < wide, "no copy of the logits"


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    logits = torch.zeros(1, 7)
    sequence = make_sequence([1], [], SamplingParams(min_tokens=1, stop_token_ids=[40]))
    got = edit_logits(make_sampler([[60], [3]]), logits, [sequence])
    assert (got == NEVER).nonzero().tolist() == [[0, EOS], [0, 3]]


@pytest.mark.gpu
def test_gpu_chooses_as_the_cpu_without_waiting(device: torch.device) -> None:
    logits, sequences = random_batch(random.Random(3), 32)
    wanted = make_sampler().sample(logits.clone(), sequences)
    sampler = make_sampler(ops=TRITON)
    # This run compiles kernels
    sampler.sample(logits.to(device), sequences)
    again, there = make_sampler(ops=TRITON), logits.to(device)
    with warnings.catch_warnings():
        # torch warns that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            drawn = again.draw(there, DrawBatch.of(sequences))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for have, want in zip(drawn.choices(), wanted, strict=True):
        assert have.token_id == want.token_id
        assert (have.logprobs is None) == (want.logprobs is None)
        for token, entry in (want.logprobs or {}).items():
            mine = cast(Any, have.logprobs)[token]
            assert (mine.rank, mine.decoded_token) == (entry.rank, entry.decoded_token)
            assert mine.logprob == pytest.approx(entry.logprob, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_bits_give_the_conditional_distribution(temperature: float) -> None:
    # Without bits, draws of other tokens are left out: both must be the same distribution
    rows, rounds, width = 20_000, 10, 64
    torch.manual_seed(0)
    logits = torch.randn(width)
    allowed = [*range(3, width, 5)]
    word = np.zeros(2, np.uint32)
    for token in allowed:
        word[token // 32] |= np.uint32(1 << token % 32)
    bits = torch.from_numpy(np.tile(word.view(np.int32), (rows, 1)))
    counts = torch.zeros(2, width, dtype=torch.float64)
    column = torch.full((rows,), temperature)
    ones, zeros = torch.ones(rows), torch.zeros(rows)
    for turn in range(rounds):
        for kind in range(2):
            batch = logits.expand(rows, -1).clone()
            if kind:
                REFERENCE.apply_bitmask(batch, torch.arange(rows), bits)
            seeds = torch.arange(rows) + (turn + rounds * kind) * rows
            drawn = REFERENCE.sample(batch, column, zeros.long(), ones, zeros, seeds, zeros.long())
            counts[kind] += torch.bincount(drawn, minlength=width)
    outside = [token for token in range(width) if token not in allowed]
    assert counts[1].sum() == rows * rounds
    assert counts[1, outside].sum() == 0
    assert counts[0, outside].sum() > 0
    both = counts[:, allowed]
    wanted = both.sum(0) * both.sum(1, keepdim=True) / both.sum()
    # 12 degrees of freedom: this is passed once in a hundred thousand runs
    assert ((both - wanted) ** 2 / wanted).sum() < 46.0
