"""What was found of all compared rows: the figures of the summary, and a sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from idefics2_engine.agreement.token_agreement import TokenAgreement
from idefics2_engine.jobs.shadow.row_choice import ChosenRow

_WORST = 5


def shadow_figures(chosen: Sequence[ChosenRow], *, same_operations: bool = False) -> dict[str, Any]:
    """Return the agreement of chosen rows, as JSON data.

    ``worst`` are the rows with the largest divergences, the largest first. ``same_operations``
    says whether the engine's operations are the reference.
    """
    compared = [(one, one.agreement) for one in chosen if one.agreement is not None]
    total = TokenAgreement()
    for _, agreement in compared:
        total.add(agreement)
    compared.sort(key=lambda pair: (-pair[1].not_finite, -pair[1].largest_kl, pair[0].row.index))
    return {
        "rows": {"chosen": len(chosen), "compared": len(compared)},
        "same_operations": same_operations,
        **_figures(total),
        "mean_kl": total.mean_kl,
        "greedy": {
            "tokens": total.greedy_tokens,
            "top1_agreement": total.greedy_agreement,
            "largest_margin": total.greedy_margin,
        },
        "worst": [
            {"row": one.row.number, "id": one.row.id, **_figures(agreement)}
            for one, agreement in compared[:_WORST]
        ],
    }


def shadow_sentence(figures: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Return the figures of ``shadow_figures`` in one line, with what ``ShadowRun`` says."""
    rows, greedy, mean = figures["rows"], figures["greedy"], figures["mean_kl"]
    if not rows["chosen"]:
        return (
            "no row was chosen; only rows of at most 4,096 tokens that were answered with --shadow "
            "are compared"
        )
    parts = [f"{rows['compared']} of {rows['chosen']} chosen rows compared"]
    missing = []
    if run["skipped"]:
        why = "comparing was ended" if run["ended_early"] else "2 % of the time was used"
        missing.append(f"{run['skipped']} skipped: {why}")
    if run["failed"]:
        missing.append(f"{run['failed']} failed")
    if missing:
        parts[0] += f" ({', '.join(missing)})"
    if not rows["compared"]:
        return parts[0]
    parts[0] += f", {figures['tokens']} tokens"
    if figures["same_operations"]:
        parts.append("on a CPU both are the reference")
    parts.append(
        f"the best token is the same for {percentage(figures['top1_agreement'])}, "
        f"KL {'-' if mean is None else format(mean, '.2g')} on average and at most "
        f"{figures['largest_kl']:.2g}"
    )
    if greedy["tokens"]:
        share = percentage(greedy["top1_agreement"])
        parts.append(f"of {greedy['tokens']} greedy tokens {share} are the reference's best")
    if figures["not_finite"]:
        parts.append(f"{figures['not_finite']} tokens have logits that are not finite")
    return "; ".join(parts)


def percentage(share: float) -> str:
    """Return a share, which is 100 % only if it is 1."""
    text = f"{share:.2%}"
    return "> 99.99%" if text == "100.00%" and share < 1 else text


def _figures(agreement: TokenAgreement) -> dict[str, Any]:
    return {
        "tokens": agreement.tokens,
        "top1_agreement": agreement.top1_agreement,
        "largest_kl": agreement.largest_kl,
        "largest_margin": agreement.largest_margin,
        "not_finite": agreement.not_finite,
    }
