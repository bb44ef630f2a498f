"""The report of a sweep, from folders as a sweep leaves them."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfguide.errors import UserError
from selfguide.intervals import bootstrap_clusters, resample_columns
from selfguide.report import read_report, write_report
from selfguide.report.sweep_reading import SweptTask, reconcile
from selfguide.report.sweep_significance import benjamini_hochberg, holm, sign_flip_p, sign_p, wilcoxon_p
from selfguide.store import RunStore
from tests.sweep_data import write_lines, write_sweep
from tests.test_report import check_documented

Json = dict[str, Any]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return write_sweep(tmp_path_factory.mktemp("swept"))


@pytest.fixture(scope="module")
def sweep(swept: RunStore) -> Json:
    return dict(read_report(swept.root)["sweep"])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three tasks, all done."""
    return Path(write_sweep(tmp_path, 3, rows=8).root)


def group(sweep: Json, scope: str, name: str | None = None, kind: str | None = None) -> Json:
    [found] = [
        one for one in sweep["groups"] if one["scope"] == scope and one["name"] == name and kind in (None, one["kind"])
    ]
    return dict(found)


def method(one: Json, name: str) -> Json:
    [found] = [found for found in one["methods"] if found["method"] == name]
    return dict(found)


# ---- the document


def test_every_key_is_documented(swept: RunStore) -> None:
    document = read_report(swept.root)
    check_documented(document, "[report](#report)", "report")
    assert document["tasks"] == []
    assert document["recipes"][0]["settings"]["name"] == "paper"


def test_every_task_has_exactly_one_state(sweep: Json) -> None:
    states = [task["state"] for task in sweep["tasks"]]
    assert len(states) == 30
    assert {state: states.count(state) for state in set(states)} == {"done": 26, "failed": 2, "waiting": 2}
    assert sweep["counts"] == {
        "listed": 30, "done": 26, "failed": 2, "waiting": 2, "scored": 26, "absent": 1, "invalid": 1,
    }  # fmt: skip


@pytest.mark.parametrize("tasks", [["a"], ["a", "b", "b"], ["a", "c"]])
def test_a_task_that_is_lost_or_doubled_is_a_bug(tasks: list[str]) -> None:
    found = [SweptTask({"task": name, "job": name}, "done", 1, None, None) for name in tasks]
    with pytest.raises(AssertionError, match="told apart"):
        reconcile(found, [{"job": "a"}, {"job": "b"}])


def test_means_count_each_task_the_same(sweep: Json) -> None:
    """By the metric of the kind, over the tasks that have the method."""
    for kind, metric in (("classification", "exact_match"), ("generation", "rouge_l")):
        mine = [task for task in sweep["tasks"] if task["state"] == "done" and task["kind"] == kind]
        for name in ("base", "self_guide"):
            means = [method(task, name)["scores"][metric]["mean"] for task in mine]
            found = method(group(sweep, "kind", kind=kind), name)
            assert found["num_tasks"] == len(mine)
            assert found["score"]["mean"] == pytest.approx(sum(means) / len(means), abs=0.01)
            assert found["score"]["low"] < found["score"]["mean"] < found["score"]["high"]


def test_a_method_that_some_tasks_lack_says_over_which_it_is(sweep: Json) -> None:
    calibrated = method(group(sweep, "all"), "calibrated_labels")
    assert calibrated["num_tasks"] == group(sweep, "kind", kind="classification")["num_tasks"] == 11
    assert (
        calibrated["difference"]
        == method(group(sweep, "kind", kind="classification"), "calibrated_labels")["difference"]
    )


def test_categories_and_the_official_test_split_are_apart(sweep: Json) -> None:
    official = [task for task in sweep["tasks"] if task["in_official_test"] and task["state"] == "done"]
    counts = {one["name"]: one["num_tasks"] for one in sweep["groups"] if one["scope"] == "test_category"}
    assert (
        sum(counts.values())
        == len(official)
        == sum(one["num_tasks"] for one in sweep["groups"] if one["scope"] == "test_kind")
    )
    whole = {one["name"]: one["num_tasks"] for one in sweep["groups"] if one["scope"] == "category"}
    assert sum(whole.values()) == 26
    assert all(counts[name] <= whole[name] for name in counts)


def test_wins_losses_and_ties_are_of_the_tasks_gains(sweep: Json) -> None:
    for pair in sweep["pairs"]:
        tests = [
            one for task in sweep["tasks"] for one in task["tests"]
            if one["method"] == pair["method"] and pair["kind"] in (None, task["kind"])
        ]  # fmt: skip
        gains = [one["gain"] for one in tests]
        assert pair["num_tasks"] == len(tests) == pair["wins"] + pair["losses"] + pair["ties"]
        assert (pair["wins"], pair["losses"]) == (sum(g > 0 for g in gains), sum(g < 0 for g in gains))
        assert pair["surely_better"] == sum(one["gain"] > 0 and one["holm_p"] <= 0.05 for one in tests)
        assert pair["likely_worse"] == sum(one["gain"] < 0 and one["bh_p"] <= 0.05 for one in tests)
        assert all(one["p"] <= one["bh_p"] <= one["holm_p"] <= 1 for one in tests)


def test_the_funnel_sums_up_tasks_that_came_to_the_end(sweep: Json) -> None:
    funnel = sweep["funnel"]
    assert funnel["num_tasks"] == 26
    assert [step["rows"] for step in funnel["steps"]] == [26 * rows for rows in (50, 40, 30, 29)]
    assert [(one["reason"], one["rows"]) for one in funnel["losses"]] == [
        ("duplicate", 208), ("copy", 52), ("consistency", 260), ("max_length", 26),
    ]  # fmt: skip
    failed = next(task for task in sweep["tasks"] if task["state"] == "failed")
    assert failed["funnel"] == {"candidates": 20, "inputs_accepted": 3, "pairs_kept": None, "rows_trained": None}


def test_stages_add_up(sweep: Json) -> None:
    stages = {one["stage"]: one for one in sweep["stages"]}
    assert stages["synthesis"]["num_tasks"] == 28  # those of the failed tasks too
    assert stages["evaluation"]["num_stages"] == 26 * 4 + 11
    assert stages["evaluation"]["output_tokens"] == 1_000 * (26 * 4 + 11)
    assert sum(one["share"] for one in sweep["stages"]) == pytest.approx(1, abs=1e-3)
    for name, one in stages.items():
        seconds = {task["task"]: task["stage_seconds"][name] for task in sweep["tasks"]}
        assert one["seconds"] == pytest.approx(sum(seconds.values()), abs=1e-3)
        assert one["worst_s"] == max(seconds.values()) == seconds[one["worst_task"]]


def test_sessions_add_up_and_a_killed_one_has_no_end(sweep: Json) -> None:
    first, second = sweep["sessions"]
    assert first["began"] == "2023-11-14T22:13:20+00:00"
    assert (first["end"], second["end"]) == ("none recorded", "whole")
    assert first["num_done"] + second["num_done"] == sweep["totals"]["num_done"] == 26
    assert sweep["totals"]["num_failed"] == 2
    assert sweep["totals"]["engine_idle_share"] == 0.25
    assert sweep["totals"]["engine_starved_s"] == 4
    assert sweep["totals"]["seconds"] == 100
    assert sweep["totals"]["tasks_per_hour"] == 26 * 36
    assert (sweep["totals"]["num_engine_deaths"], sweep["totals"]["num_stale"]) == (2, 6)
    assert second["runner_rss_bytes"] == 2**28 + 5


def test_failures_that_differ_in_numbers_count_together(sweep: Json) -> None:
    [failure] = sweep["failures"]
    assert failure["error"] == "TaskFailed"
    assert failure["num_tasks"] == len(failure["tasks"]) == 2
    assert failure["reason"].startswith(failure["tasks"][0])


# ---- what changes between runs


def outcomes_of(root: Path) -> list[Json]:
    return [json.loads(line) for line in (root / "sweep" / "outcomes.jsonl").read_text().splitlines()]


def test_the_last_outcome_of_a_job_counts(small: Path) -> None:
    path, lines = small / "sweep" / "outcomes.jsonl", outcomes_of(small)
    failed = lines[0] | {"state": "failed", "error": "RunnerDied", "reason": "gone", "result": None}
    write_lines(path, [failed, *lines])
    assert [task["state"] for task in read_report(small)["sweep"]["tasks"]] == ["done"] * 3
    write_lines(path, [*lines, failed])
    first = read_report(small)["sweep"]["tasks"][0]
    assert (first["state"], first["error"], first["attempts"]) == ("failed", "RunnerDied", 2)


def test_a_torn_line_is_passed_over(small: Path) -> None:
    for name in ("outcomes.jsonl", "events.jsonl"):
        with (small / "sweep" / name).open("a") as file:
            file.write('{"job": "0000')
    assert read_report(small)["sweep"]["counts"]["done"] == 3


def test_a_task_whose_stages_were_replaced_is_waiting(small: Path) -> None:
    store = RunStore(small)
    assert store.tasks()[0].retire("curation") == 1
    first, *others = read_report(small)["sweep"]["tasks"]
    assert first["state"] == "waiting"
    assert "made again" in first["reason"]
    assert [task["state"] for task in others] == ["done", "done"]


def test_a_sweep_that_has_only_begun_can_be_reported(tmp_path: Path) -> None:
    root = write_sweep(tmp_path, 3, rows=8).root
    for name in ("outcomes.jsonl", "events.jsonl"):
        (root / "sweep" / name).unlink()
    document, markdown = write_report(root)
    check_documented(document, "[report](#report)", "report")
    assert document["sweep"]["counts"]["waiting"] == 3
    assert document["sweep"]["sessions"] == []
    assert "No task with held-out data is done yet" in markdown
    assert "No task with held-out data is done yet" in (root / "report.html").read_text()


@pytest.mark.parametrize(("text", "said"), [("{", "damaged"), ('{"format": 2}', "newer selfguide")])
def test_a_list_that_cannot_be_read_is_refused(small: Path, text: str, said: str) -> None:
    (small / "sweep" / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_report(small)


def test_a_damaged_evaluation_is_named(small: Path) -> None:
    path = next((small / "tasks").glob("*/evaluation/*/rows.parquet"))
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_report(small)


def test_the_same_folder_gives_the_same_report(swept: RunStore) -> None:
    assert read_report(swept.root) == read_report(swept.root)


# ---- statistics


def test_the_test_of_exact_match_is_mcnemars() -> None:
    chance = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert sign_flip_p([1.0] * 9 + [-1.0] * 2 + [0.0] * 50) == pytest.approx(chance, rel=1e-12)
    assert sign_flip_p([0.0] * 5) == 1.0
    assert sign_p([5.0, 3.0, 0.5, -9.0, 0.0]) == pytest.approx(2 * 5 / 16)


def test_the_test_of_rouge_counts_all_signs() -> None:
    rng = np.random.default_rng(1)
    for size in (1, 4, 11):
        differences = np.round(rng.normal(0.1, 0.3, size), 3)
        signs = np.array(list(itertools.product([-1, 1], repeat=size)))
        far = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
        assert sign_flip_p(differences) == pytest.approx(far.mean(), rel=1e-9)


def test_a_large_task_is_tested_in_coarser_units() -> None:
    """Against the normal distribution, which 5,000 rows come close to."""
    differences = np.random.default_rng(2).normal(0.01, 0.3, 5_000)
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    assert sign_flip_p(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)


def test_wilcoxons_test_is_by_ranks() -> None:
    """Of eight pairs the sixth smallest is against: 14 of the 256 assignments have a sum of at most six on one side."""
    assert wilcoxon_p([1, 2, 3, 4, 5, -6, 70, 800]) == pytest.approx(2 * 14 / 256)
    assert wilcoxon_p([1, 1, -1, -1]) == 1.0
    assert wilcoxon_p([]) == 1.0


def test_corrections_for_many_tests() -> None:
    chances = [0.01, 0.04, 0.03, 0.005]
    assert holm(chances) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(chances) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_intervals_respect_tasks() -> None:
    """Tasks that differ much make a wide interval, however many rows each has."""
    rng = np.random.default_rng(0)
    means = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0] * 4)
    drawn = np.stack([resample_columns(np.full((1_000, 1), mean), 50, rng)[:, 0] for mean in means])
    low, high = bootstrap_clusters(drawn, 2_000, 0)
    half = 1.96 * 100 * means.std() / math.sqrt(len(means))
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_the_interval_of_one_task_is_that_of_its_rows() -> None:
    rows = np.array([[1.0], [0.0]] * 200)
    drawn = resample_columns(rows, 2_000, np.random.default_rng(0)).T
    low, high = bootstrap_clusters(drawn, 4_000, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * 100 * 0.5 / math.sqrt(400), rel=0.1)


def test_columns_are_resampled_together() -> None:
    rows = np.random.default_rng(0).uniform(size=(30, 1)) * np.array([[1.0, 2.0]])
    drawn = resample_columns(rows, 100, np.random.default_rng(1))
    assert drawn[:, 1] == pytest.approx(2 * drawn[:, 0])


# ---- Markdown and HTML


def test_the_markdown_says_what_counts_first(swept: RunStore) -> None:
    _, markdown = write_report(swept.root)
    assert markdown == (swept.root / "report.md").read_text()
    assert "26 done, 2 failed, 2 waiting" in markdown.splitlines()[2]
    heads = re.findall(r"^## (.+)$", markdown, re.MULTILINE)
    assert heads[0] == "Methods side by side"
    assert {"Categories", "Sessions", "Failed tasks", "The largest gains against the base"} <= set(heads)


def test_the_markdown_of_many_tasks_stays_short(tmp_path: Path) -> None:
    """The twenty largest gains, however many there are."""
    store = write_sweep(tmp_path, 56, rows=10)
    _, markdown = write_report(store.root)
    assert len(markdown.splitlines()) < 200
    section = markdown.split("## The largest gains against the base")[1].split("##")[0]
    assert len(re.findall(r"^\| task\d", section, re.MULTILINE)) == 20


class _Page(HTMLParser):
    """Collects tags, their attributes, and rows of tasks; notices what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_whole_and_asks_nothing_of_the_network(swept: RunStore) -> None:
    write_report(swept.root)
    html = (swept.root / "report.html").read_text()
    page = parse(html)
    assert not [attrs for _, attrs in page.seen if attrs.keys() & {"src", "href", "srcset", "action"}]
    assert "://" not in html
    assert sum(tag == "td" and attrs.get("class") == "name" for tag, attrs in page.seen) == 30
    assert [attrs["aria-label"] for tag, attrs in page.seen if tag == "svg"][
        -1
    ] == "Share of the seconds of work by stage"


HOSTILE = '</script><img src=x onerror="alert(1)">\x1b[31m\u202e `*'


def test_text_from_outside_is_shown_and_not_obeyed(small: Path) -> None:
    path = small / "sweep" / "sweep.json"
    facts = json.loads(path.read_text())
    for task in facts["tasks"]:
        task["category"] = HOSTILE
    facts |= {"absent": [HOSTILE], "invalid": [{"source": HOSTILE, "reason": HOSTILE}]}
    facts["recipe"]["name"] = HOSTILE
    path.write_text(json.dumps(facts))
    lines = outcomes_of(small)
    write_lines(
        path.with_name("outcomes.jsonl"),
        [*lines[:2], lines[2] | {"state": "failed", "error": HOSTILE, "reason": HOSTILE}],
    )
    _, markdown = write_report(small)
    html = (small / "report.html").read_text()
    page = parse(html)
    assert "img" not in [tag for tag, _ in page.seen]
    assert sum(tag == "script" for tag, _ in page.seen) == 1
    assert "<img" not in markdown
    for text in (html, markdown):
        assert not set("\x1b\u202e") & set(text)
        assert "\\x1b[31m" in text.replace("\\\\", "\\").replace("\\[", "[")
