"""The heat map of a case by tokens and by the layers that compute them."""

from collections.abc import Collection, Sequence
from itertools import groupby

import numpy as np

from idefics2_engine.charts.heat_map import HeatColumn, HeatMap, HeatRow
from idefics2_engine.charts.shades import Shades
from idefics2_engine.parity import stages
from idefics2_engine.parity.measures.row_differences import Rows
from idefics2_engine.parity.measures.worst_cases import WorstCase
from idefics2_engine.prompts.tokenizer import IMAGE

# Longer maps have several tokens in a row
_MOST_ROWS = 64
# So many equal tokens and more are one row
_LEAST_RUN = 3
_LABELS = {
    stages.PERCEIVER_NORM: ("latents", "pn"),
    stages.TEXT_EMBEDDING: ("embed", "e"),
    stages.TEXT_NORM: ("norm", "n"),
    stages.LOGITS: ("logits", "l"),
}
_NOTE = (
    "Columns: perceiver layers (p0, …) and norm (pn), embedding (e), text layers (0, …), norm (n), "
    "logits (l). The latents of images are beside their tokens."
)


def token_map(
    worst: WorstCase, order: Sequence[str], differing: Collection[str], shades: Shades
) -> HeatMap:
    """Return the map of a case.

    Args:
        worst: The case.
        order: Stages of the model.
        differing: Those that differ beyond rounding.
        shades: The scale.
    """
    values = {stage: rows for stage in order if (rows := _token_values(worst, stage)) is not None}
    # The last token of an answer is not computed
    answered = max(len(worst.recording.answer_ids) - 1, 0)
    texts = worst.recording.token_texts[: len(worst.recording.prompt_ids) + answered]
    groups = _groups(texts)
    matrix = np.full((len(groups), len(values)), np.nan, np.float32)
    columns = []
    for index, (stage, rows) in enumerate(values.items()):
        for row, (begin, end) in enumerate(groups):
            # fmax takes the number where one of two is NaN
            matrix[row, index] = np.fmax.reduce(rows[begin:end])
        columns.append(_column(stage, rows, texts, stage in differing))
    rows_shown = [_row(texts, begin, end) for begin, end in groups]
    heading = f"{worst.title}: tokens by layers"
    return HeatMap(heading, rows_shown, columns, matrix, shades, _NOTE, "differs beyond rounding")


def _token_values(worst: WorstCase, stage: str) -> Rows | None:
    """Return the difference of each token at a stage, NaN where there is none.

    ``None`` if its rows are neither tokens nor the latents of all images.
    """
    parts = worst.differences.get(stage, [])
    length = len(worst.recording.ids)
    found = np.full(length, np.nan, np.float32)
    unit = stages.unit(stage)
    if unit == "token" and stage not in stages.EXACT:
        for begin, part in zip((0, len(worst.recording.prompt_ids)), parts, strict=False):
            found[begin : begin + len(part)] = part
        return found
    if unit == "latent":
        prompt = worst.recording.token_texts[: len(worst.recording.prompt_ids)]
        places = [i for i, text in enumerate(prompt) if text == IMAGE]
        # A part that cannot be compared has no rows
        if places and sum(map(len, parts)) == len(places):
            found[places] = np.concatenate(parts)
            return found
    return None


def _groups(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return begins and ends of the tokens that are a row together.

    Other tokens share rows before the runs of two images do.
    """
    runs, begin = [], 0
    for _, same in groupby(texts):
        end = begin + len(list(same))
        runs.append((begin, end))
        begin = end
    each = 1
    while len(groups := _cut(runs, each)) > _MOST_ROWS and each < len(texts):
        each *= 2
    several = -(-len(groups) // _MOST_ROWS)
    chunks = [groups[i : i + several] for i in range(0, len(groups), several)]
    return [(chunk[0][0], chunk[-1][1]) for chunk in chunks]


def _cut(runs: Sequence[tuple[int, int]], each: int) -> list[tuple[int, int]]:
    """Return the long runs, and ``each`` tokens at a time of what is between them."""
    groups: list[tuple[int, int]] = []
    for is_long, own in groupby(runs, lambda run: run[1] - run[0] >= _LEAST_RUN):
        stretch = list(own)
        begin, end = stretch[0][0], stretch[-1][1]
        if is_long:
            groups += stretch
        else:
            groups += [(i, min(i + each, end)) for i in range(begin, end, each)]
    return groups


def _row(texts: Sequence[str], begin: int, end: int) -> HeatRow:
    first = texts[begin]
    if end - begin == 1:
        return HeatRow(f"{begin} {_quoted(first)}", f"token {begin} {first!r}")
    same = len(set(texts[begin:end])) == 1
    label = f"{begin} {_quoted(first)} {'x' if same else '…'} {end - begin}"
    return HeatRow(label, f"tokens {begin} to {end - 1}, the first is {first!r}")


def _quoted(text: str) -> str:
    """Return a token as it is written on an axis: quoted only where it would not be seen."""
    shown = repr(text)
    return text if text.strip() == text and text and shown[1:-1] == text else shown


def _column(stage: str, rows: Rows, texts: Sequence[str], is_marked: bool) -> HeatColumn:
    label, short = _LABELS.get(stage, (stage.rpartition("layer ")[2] or stage,) * 2)
    if stage.startswith("perceiver layer"):
        label = short = f"p{label}"
    title = stage
    if not np.isnan(rows).all():
        worst = int(np.nanargmax(rows))
        title += f": at most {rows[worst]:.1e}, token {worst} {texts[worst]!r}"
    return HeatColumn(label, short, title, is_marked)
