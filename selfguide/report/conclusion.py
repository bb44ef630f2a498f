"""What a line's numbers say, in sentences to quote. Nothing is claimed that an interval does not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfguide.report.cells import bounds, points

TITLES = {
    "base": "the untuned student",
    "few_shot_icl": "few-shot ICL with all demonstrations",
    "filtered_decoding": "filtered decoding",
    "constrained_labels": "the untuned student's likeliest label",
    "calibrated_labels": "the untuned student's calibrated label",
    "few_shot_sft": "finetuning on the demonstrations alone",
    "self_guide": "SELF-GUIDE",
}
METRIC_TITLES = {
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "authors_em": "the authors' EM",
    "authors_rouge_char": "the authors' ROUGE-L of characters",
}
"""Every metric; the authors' are there under their protocol alone."""


def conclude(line: Mapping[str, Any]) -> list[str]:
    """Sentences about one line (a `line` of `docs/report.md`), the caveats first."""
    metric = line["primary_metric"]
    if metric is None:
        return ["The task has no held-out data, so there are no scores."]
    others = {one["method"]: one for one in line["methods"] if one["method"] != "self_guide"}
    base = others.pop("base")
    gain = base["differences"][metric]
    sentences = [*_caveats(line), _against_base(gain, metric)]
    for control in others.values():
        if control["evaluation"] != base["evaluation"]:
            sentences += _against_control(control["method"], control["differences"][metric], sign(gain) > 0)
    return sentences


def title(method: str) -> str:
    return TITLES.get(method, method.replace("_", " "))


def sign(estimate: Mapping[str, Any]) -> int:
    """1 or -1 where the interval, as printed, lies on one side of zero; else 0."""
    low, high = round(estimate["low"], 1), round(estimate["high"], 1)
    return int(low > 0) - int(high < 0)


def _caveats(line: Mapping[str, Any]) -> list[str]:
    caveats = []
    if line["engine"] == "simulated":
        caveats.append("Simulated engines answered, without a model: the scores mean nothing.")
    elif line["student"]["name"] == "random":
        caveats.append("The student's weights are random: the scores say nothing about the method.")
    if line["labels_from"] == "instances":
        caveats.append("The labels were read off the test answers, which flatters every method.")
    if line["proof"]["status"] == "indistinguishable from base":
        caveats.append("Training changed the student by no more than the engine's numerical noise.")
    return caveats


def _against_base(gain: Mapping[str, Any], metric: str) -> str:
    amount = points(abs(gain["mean"]))
    if float(amount) == 0:
        claim = f"SELF-GUIDE and the untuned student score the same in {METRIC_TITLES[metric]}"
    else:
        side = "above" if gain["mean"] > 0 else "below"
        claim = f"SELF-GUIDE is {amount} points {side} the untuned student in {METRIC_TITLES[metric]}"
    verdict = {1: "excludes zero", 0: "does not exclude zero", -1: "excludes zero: finetuning made the student worse"}
    return f"{claim} (95% interval {bounds(gain)}, n = {gain['n']}), which {verdict[sign(gain)]}."


def _against_control(method: str, gain: Mapping[str, Any], gained: bool) -> list[str]:
    """A control matters where it is clearly better or worse, or may explain the gain."""
    name, amount, side_of = title(method), points(abs(gain["mean"])), sign(gain)
    cost = "which needs no synthetic data" if method == "few_shot_sft" else "which trains nothing"
    if side_of:
        side = "above" if side_of > 0 else "below"
        return [f"It is {amount} points {side} {name}, {cost} (95% interval {bounds(gain)})."]
    if not gained:
        return []
    numbers = f"difference {points(gain['mean'])}, 95% interval {bounds(gain)}"
    return [f"It is not shown to be above {name} ({numbers}), {cost} and may explain the gain."]
