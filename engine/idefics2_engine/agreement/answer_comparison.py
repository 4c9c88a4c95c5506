"""A row's answers on two implementations of the operations, which get the same tokens."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from idefics2_engine.agreement.logits import compare_logits
from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.device import torch_defaults
from idefics2_engine.images.tiling import ImageConfig, Tile
from idefics2_engine.model.batch import ImageBatch, TextBatch
from idefics2_engine.model.idefics2 import Idefics2

# Rows of logits that are held at once, in float64 several times
_LOGITS_ROWS = 256


@torch_defaults()
@torch.inference_mode()
def compare_answers(
    models: tuple[Idefics2, Idefics2],
    token_ids: Sequence[int],
    tiles: Sequence[Tile],
    answers: Sequence[Sequence[int]],
    *,
    image_config: ImageConfig,
    is_greedy: bool,
    barred: Sequence[int] = (),
) -> TokenAgreement:
    """Compare models A and B at every token of the answers that A gave to a prompt.

    Each model computes the prompt with an answer in one pass, without a KV cache. Tiles and answers
    are computed one by one, so memory does not grow with them.

    Args:
        models: A, and B with which it is compared, on one device.
        token_ids: Token ids of the prompt, with placeholders expanded.
        tiles: Its tiles.
        answers: Token ids of each answer.
        image_config: Normalization of pixels.
        is_greedy: Whether each token of an answer was the best one of A that is not ``barred``.
        barred: Tokens that no answer has.
    """
    device = models[0].device
    total = TokenAgreement()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        sides = [_Side(model, token_ids, tiles, image_config) for model in models]
        for answer_ids in answers:
            hidden = [side.hidden_states(answer_ids) for side in sides]
            for begin in range(0, len(answer_ids), _LOGITS_ROWS):
                part = slice(begin, begin + _LOGITS_ROWS)
                pairs = zip(models, hidden, strict=True)
                a, b = (model.logits(states[part]) for model, states in pairs)
                total.add(_agreement(a, b))
                if is_greedy:
                    total.add(_greedy_agreement(b, answer_ids[part], barred))
    return total


class _Side:
    """A model that has encoded the images of a prompt, and reads answers to it."""

    def __init__(
        self,
        model: Idefics2,
        token_ids: Sequence[int],
        tiles: Sequence[Tile],
        image_config: ImageConfig,
    ) -> None:
        self._model = model
        self._token_ids = list(token_ids)
        batches = (ImageBatch.from_tiles([tile], image_config) for tile in tiles)
        encoded = [model.image_features(batch.to(model.device)) for batch in batches]
        self._features = torch.cat(encoded) if encoded else None

    def hidden_states(self, answer_ids: Sequence[int]) -> Tensor:
        """Return the hidden states (len(answer), hidden) from which the answer's tokens follow."""
        batch = TextBatch.from_ids([[*self._token_ids, *answer_ids[:-1]]]).to(self._model.device)
        hidden = self._model.hidden_states(batch, self._features)
        return hidden[len(self._token_ids) - 1 :]


def _agreement(a: Tensor, b: Tensor) -> TokenAgreement:
    is_finite = a.isfinite().all(-1) & b.isfinite().all(-1)
    found = compare_logits(a[is_finite], b[is_finite])
    counts = TokenAgreement(tokens=len(a), not_finite=len(a) - len(found.kl))
    if len(found.kl):
        counts.same_best = int(found.agrees.sum())
        counts.total_kl = float(found.kl.sum())
        counts.largest_kl = float(found.kl.max())
        counts.largest_margin = float(found.margins.max())
    return counts


def _greedy_agreement(
    logits: Tensor, answer_ids: Sequence[int], barred: Sequence[int]
) -> TokenAgreement:
    allowed = logits.to(torch.float64, copy=True)
    allowed[:, list(barred)] = -torch.inf
    answered = torch.tensor(answer_ids, device=logits.device)
    # A token that is not finite is the best of nothing
    margins = allowed.amax(-1) - allowed.gather(-1, answered[:, None])[:, 0]
    finite = margins[margins.isfinite()]
    return TokenAgreement(
        greedy_tokens=len(margins),
        greedy_best=int((margins == 0).sum()),
        greedy_margin=float(finite.max()) if len(finite) else 0.0,
    )
