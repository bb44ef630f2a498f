"""Reports of run folders that are written by hand, artifact by artifact."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from markdown_it import MarkdownIt

from selfguide import comparison, config, evaluation, finetuning, synthesis
from selfguide.environment import environment
from selfguide.errors import UserError
from selfguide.records import ACCEPTED, FAILED, REJECTED, Ledger
from selfguide.replication import MARKER
from selfguide.report import read_report, write_report
from selfguide.report.cells import escape
from selfguide.report.conclusion import METRIC_TITLES, conclude
from selfguide.store import SHARD_ROWS, Artifact, RunStore, TaskStore

REPO = Path(__file__).parent.parent
CURATION = pa.schema([(name, pa.string()) for name in ("state", "filter", "reason")])
Rows = list[dict[str, Any]]
Methods = Mapping[str, Artifact]

# ---- run folders written by hand


def rows_of(schema: pa.Schema, accepted: int, lost: Mapping[tuple[str, str], int] | None = None) -> Rows:
    """`accepted` accepted rows, and for each (state, filter) of `lost` that many more."""
    ends: list[tuple[str, str | None]] = [(ACCEPTED, None)] * accepted
    ends += [end for end, number in (lost or {}).items() for _ in range(number)]
    rows = []
    for i, (state, name) in enumerate(ends):
        row = dict.fromkeys(schema.names) | {"state": state, "filter": name, "reason": name}
        rows.append({key: row[key] for key in schema.names} | ({"row": i} if "row" in schema.names else {}))
    return rows


def finish(
    store: TaskStore, name: str, made_by: Mapping[str, Any], inputs: Sequence[Artifact], rows: Rows,
    schema: pa.Schema, events: Sequence[Mapping[str, Any]] = (), **facts: Any,
) -> Artifact:  # fmt: skip
    """Makes the stage, unless it is there already, as the pipeline does."""
    stage = store.stage(name, made_by, inputs)
    if stage.done:
        return stage.done
    ledger = Ledger(len(rows), len(rows), {}, {}) if name == "comparison" else Ledger.of(rows)
    with stage.writing():
        for event in events:
            stage.log(event)
        return stage.finish(rows, schema, ledger, **facts)


TOKENS: dict[str, Any] = {"prompt_tokens": 1000, "output_tokens": 100, "cached_tokens": 800}
TASK: dict[str, Any] = {
    "name": "colours", "kind": "classification", "labels_from": "examples", "num_labels": 2, "num_examples": 3,
    "num_instances": 100, "category": "Colour", "output_language": "English", "remarks": [],
}  # fmt: skip
PROOF = {"status": "proven", "engine_difference": 1e-7, "training_difference": 0.3, "noise": 2e-7, "adapter": "x"}
LORA = {"method": "lora", "lora_rank": 16}
TRAIN = {
    "rows": 6, "steps": 4, "epochs": 2, "tokens": 900, "completion_tokens": 60, "train_s": 1.5,
    "loss_curve": [{"step": 1.0, "loss": 3.5}, {"step": 4.0, "loss": 1.25}],
}  # fmt: skip
GAINS = {"base": (4.2, -1.0, 9.1), "few_shot_icl": (3.0, -2.0, 8.0), "filtered_decoding": (1.0, -3.0, 5.0)}


def write_line(store: TaskStore, **changes: Any) -> Artifact:
    """All artifacts of one line, but for `changes` as below."""
    say: dict[str, Any] = {
        "recipe": "paper", "seed": 0, "task": TASK, "digest": "d" * 64, "student": "org/model", "engine": "vllm",
        "train": TRAIN, "proof": PROOF, "gains": GAINS, "metrics": ("exact_match", "rouge_l"), "rejected": "duplicate",
        "protocol": "official",
    } | changes  # fmt: skip
    common = {"task": say["digest"], "model": "e" * 64, "seed": say["seed"]}
    lost = {(REJECTED, say["rejected"]): 2, (FAILED, "refused"): 1}
    candidates = finish(
        store, "synthesis", common, [], rows_of(synthesis.SCHEMA, 7, lost), synthesis.SCHEMA, surplus=1, **TOKENS
    )
    pairs = rows_of(CURATION, 6, {(REJECTED, "consistency"): 1})
    kept = finish(store, "curation", common, [candidates], pairs, CURATION)
    trained = rows_of(finetuning.SCHEMA, 6)
    made_by = common | {"finetuning": LORA, "recipe": say["recipe"]}
    adapter = finish(store, "finetuning", made_by, [kept], trained, finetuning.SCHEMA, train=say["train"])
    methods = {name: _evaluation(store, common, name, say) for name in say["gains"]}
    if methods:
        methods["self_guide"] = _evaluation(store, common | {"recipe": say["recipe"]}, "self_guide", say, adapter)
    return _comparison(store, common, say, adapter, methods)


def _evaluation(
    task: TaskStore, common: Mapping[str, Any], name: str, say: Mapping[str, Any], adapter: Artifact | None = None
) -> Artifact:
    rows = [row | {"exact_match": 0.5} for row in rows_of(evaluation.SCHEMA, 99, {(FAILED, "prompt_too_long"): 1})]
    facts = {"scores": {"n": 100, "exact_match": 50.0, "rouge_l": None}, "kind": say["task"]["kind"], **TOKENS}
    facts |= {"proof": say["proof"] if adapter else None}
    made_by = {**common, "method": name}
    return finish(task, "evaluation", made_by, [adapter] if adapter else [], rows, evaluation.SCHEMA, **facts)


def _comparison(
    task: TaskStore, common: Mapping[str, Any], say: Mapping[str, Any], adapter: Artifact, methods: Methods
) -> Artifact:
    rows: Rows = []
    for name, artifact in methods.items():
        for metric in METRIC_TITLES:
            values = _points(say["gains"].get(name)) if metric in say["metrics"] else {}
            row = {"row": len(rows), "method": name, "evaluation": artifact.path.name, "metric": metric, "n": 100}
            rows.append({**dict.fromkeys(comparison.SCHEMA.names), **row, **values})
    settings = config.Recipe(name=say["recipe"], seed=say["seed"]).model_dump(mode="json")
    settings["engine"]["kind"], settings["model"]["path"] = say["engine"], say["student"]
    settings["evaluation"]["protocol"] = say["protocol"]
    facts = {"task": say["task"], "recipe": settings, "environment": environment()}
    inputs = [adapter, *methods.values()]
    return finish(task, "comparison", {**common, "recipe": say["recipe"]}, inputs, rows, comparison.SCHEMA, **facts)


def _points(gain: tuple[float, float, float] | None) -> dict[str, float]:
    score = {"score": 50.0, "low": 40.0, "high": 60.0}
    return score | (dict(zip(("difference", "difference_low", "difference_high"), gain, strict=True)) if gain else {})


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run")


def report_line(store: RunStore, **changes: Any) -> dict[str, Any]:
    write_line(store.task("colours"), **changes)
    [task] = read_report(store.root)["tasks"]
    [line] = task["lines"]
    return dict(line)


# ---- the documentation


def documented() -> dict[str, dict[str, str]]:
    """From docs/report.md: each object's keys and their types."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for text in (REPO / "docs" / "report.md").read_text(encoding="utf-8").splitlines():
        if text.startswith("## "):
            section = text[3:]
        elif cells := re.fullmatch(r"\| `(\w+)` \| (.+?) \| .+ \|", text):
            found.setdefault(section, {})[cells[1]] = cells[2]
    return found


PLAIN: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "map": dict}


def check_documented(value: Any, kind: str, place: str) -> None:
    """Every key that occurs is documented, every documented key occurs, and every value has its type."""
    if kind.endswith(" or null"):
        if value is not None:
            check_documented(value, kind.removesuffix(" or null"), place)
    elif kind.startswith("list of "):
        assert isinstance(value, list), place
        for i, one in enumerate(value):
            check_documented(one, kind.removeprefix("list of "), f"{place}[{i}]")
    elif kind.startswith("map to "):
        for key, one in value.items():
            check_documented(one, kind.removeprefix("map to "), f"{place}.{key}")
    elif link := re.fullmatch(r"\[(\w+)\]\(#\1\)", kind):
        keys = documented()[link[1]]
        assert list(value) == list(keys), place
        for key, one in value.items():
            check_documented(one, keys[key], f"{place}.{key}")
    else:
        assert isinstance(value, PLAIN[kind]), place
        assert kind == "boolean" or not isinstance(value, bool), place


def test_every_key_is_documented(store: RunStore) -> None:
    task = store.task("colours")
    write_line(task, metrics=("exact_match",))
    write_line(task, recipe="bare", gains={}, train=TRAIN | {"loss_curve": []})
    begin_synthesis(task, shards=1)
    check_documented(read_report(store.root), "[report](#report)", "report")


@pytest.mark.parametrize("protocol", ["authors", "official"])
def test_every_key_of_a_replication_is_documented(store: RunStore, protocol: str) -> None:
    """Scores by another protocol stand beside no published figure."""
    write_line(store.task("colours"), metrics=("exact_match", "authors_em"), protocol=protocol)
    marker = {"tasks": {"task190": "colours"}, "absent": ["task284"], "failed": {"task199": "no row was kept"}}
    (store.root / MARKER).write_text(json.dumps(marker))
    document = read_report(store.root)
    check_documented(document, "[report](#report)", "report")
    rows = {row["name"]: row for row in document["replication"]["tasks"]}
    assert rows["task190"]["measured"]["gain"] == (
        {"mean": 4.2, "low": -1.0, "high": 9.1, "n": 100} if protocol == "authors" else None
    )
    assert [rows[name]["state"] for name in ("task199", "task284", "task200")] == ["failed", "absent", "not asked for"]
    assert rows["task190"]["state"] == ("compared" if protocol == "authors" else "compared otherwise")


# ---- what a report says


CONCLUSIONS = [
    (GAINS, "4.2 points above the untuned student in exact match (95% interval -1.0 to 9.1, n = 100), which does not"),
    ({"base": (4.2, 0.0, 9.1)}, "which does not exclude zero."),
    ({"base": (4.2, 0.04, 9.1)}, "(95% interval 0.0 to 9.1, n = 100), which does not exclude zero."),
    ({"base": (4.2, 0.1, 9.1)}, "which excludes zero."),
    ({"base": (-4.2, -9.0, -0.1)}, "4.2 points below the untuned student"),
    ({"base": (-4.2, -9.0, -0.1)}, "excludes zero: finetuning made the student worse."),
    ({"base": (0.0, -1.0, 1.0)}, "score the same in exact match"),
    (
        {"base": (5.0, 1.0, 9.0), "filtered_decoding": (1.0, -3.0, 5.0)},
        "not shown to be above filtered decoding (difference 1.0, 95% interval -3.0 to 5.0), which trains nothing and "
        "may explain the gain.",
    ),
    (
        {"base": (5.0, 1.0, 9.0), "filtered_decoding": (4.0, 0.5, 8.0)},
        "It is 4.0 points above filtered decoding, which trains nothing",
    ),
    ({"base": (1.0, -3.0, 5.0), "filtered_decoding": (-9.0, -12.0, -5.0)}, "9.0 points below filtered decoding"),
]


@pytest.mark.parametrize(("gains", "said"), CONCLUSIONS)
def test_the_conclusion_claims_what_the_interval_shows(
    store: RunStore, gains: dict[str, tuple[float, ...]], said: str
) -> None:
    assert said in " ".join(report_line(store, gains=gains)["conclusion"])


def test_a_control_that_asks_what_base_asks_is_not_a_control(store: RunStore) -> None:
    line = report_line(store, gains={"base": (5.0, 1.0, 9.0), "few_shot_icl": (5.0, 1.0, 9.0)})
    assert len(line["conclusion"]) == 2
    line["methods"][1]["evaluation"] = line["methods"][0]["evaluation"]
    assert len(conclude(line)) == 1


def test_a_control_is_not_mentioned_where_there_is_no_gain_to_explain(store: RunStore) -> None:
    assert len(report_line(store, gains=GAINS)["conclusion"]) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "simulated"}, "Simulated engines"),
        ({"student": "random"}, "weights are random"),
        ({"task": TASK | {"labels_from": "instances"}}, "read off the test answers"),
        ({"proof": PROOF | {"status": "indistinguishable from base"}}, "no more than the engine's numerical noise"),
    ],
)
def test_scores_that_mean_nothing_say_so_first(store: RunStore, changes: dict[str, Any], said: str) -> None:
    assert said in report_line(store, **changes)["conclusion"][0]


def test_rouge_of_other_languages_is_unavailable(store: RunStore) -> None:
    line = report_line(store, metrics=("exact_match",), task=TASK | {"kind": "generation", "output_language": "French"})
    assert line["primary_metric"] == "exact_match"
    assert {one["scores"]["rouge_l"] for one in line["methods"]} == {None}
    assert write_report(store.root)[1].count("unavailable (not English)") == len(line["methods"])


def test_the_authors_metric_decides_under_their_protocol(store: RunStore) -> None:
    line = report_line(store, metrics=("exact_match", "rouge_l", "authors_em"))
    assert line["primary_metric"] == "authors_em"
    assert "in the authors' EM" in line["conclusion"][0]
    _, markdown = write_report(store.root)
    assert "| exact match |" in re.sub(" +", " ", markdown)
    assert "| authors' EM |" in re.sub(" +", " ", markdown)
    assert "ROUGE-L of characters" not in markdown


def test_generation_is_judged_by_rouge(store: RunStore) -> None:
    line = report_line(store, task=TASK | {"kind": "generation"})
    assert line["primary_metric"] == "rouge_l"
    assert "in ROUGE-L" in line["conclusion"][0]


def test_a_task_without_held_out_data_has_no_scores(store: RunStore) -> None:
    line = report_line(store, gains={})
    assert line["methods"] == []
    assert line["proof"] is None
    assert [step["rows"] for step in line["funnel"]] == [10, 7, 6, 6]
    assert "no held-out data" in write_report(store.root)[1]


def test_losses_and_work_are_shown(store: RunStore) -> None:
    write_line(store.task("colours"))
    _, markdown = write_report(store.root)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in markdown.splitlines() if row.startswith("|")]
    assert ["synthesis", "10", "7", "2", "1", "duplicate 2, refused 1"] in cells
    assert ["evaluation: SELF-GUIDE", "100", "99", "0", "1", "prompt_too_long 1"] in cells
    assert ["SELF-GUIDE", "50.0 (40.0 to 60.0)", "50.0 (40.0 to 60.0)", "100", "1"] in cells
    assert ["untuned student", "+4.2 (-1.0 to 9.1)", "+4.2 (-1.0 to 9.1)"] in cells
    assert any(row[0] == "synthesis" and row[2:5] == ["1,000", "800", "100"] for row in cells)
    assert "loss 3.500 to 1.250" in markdown
    assert "under way: 1." in markdown


def test_a_training_that_diverged_is_null(store: RunStore) -> None:
    diverged = [{"step": 1.0, "loss": 3.5}, {"step": 2.0, "loss": math.nan}]
    write_line(store.task("colours"), train=TRAIN | {"loss_curve": diverged})
    document, markdown = write_report(store.root)
    assert document["tasks"][0]["lines"][0]["finetuning"]["last_loss"] is None
    assert "NaN" not in (store.root / "report.json").read_text()
    assert "loss 3.500 to not finite" in markdown


# ---- lineage


def test_recipes_share_stages_and_keep_their_lines_apart(store: RunStore) -> None:
    task = store.task("colours")
    for recipe, seed in (("paper", 0), ("default", 0), ("paper", 1)):
        write_line(task, recipe=recipe, seed=seed, train=TRAIN | {"steps": 4 + seed})
    document, markdown = write_report(store.root)
    lines = document["tasks"][0]["lines"]
    assert [(line["recipe_name"], line["seed"]) for line in lines] == [("paper", 0), ("default", 0), ("paper", 1)]
    first, other, seeded = (line["lineage"] for line in lines)
    assert first["synthesis"] == other["synthesis"] != seeded["synthesis"]
    assert first["finetuning"] != other["finetuning"]
    assert [line["finetuning"]["steps"] for line in lines] == [4, 4, 5]
    assert (len(document["recipes"]), len(document["environments"])) == (3, 1)
    assert "1 task, 3 comparisons, 0 unfinished stages." in markdown
    assert "outside a comparison" not in markdown


@pytest.mark.parametrize(("rejected", "lines"), [("empty", 0), ("duplicate", 1)])
def test_a_comparison_of_replaced_stages_is_left_out(store: RunStore, rejected: str, lines: int) -> None:
    """`--force synthesis` makes the same folder anew; what came of the old rows must not claim the new ones."""
    task = store.task("colours")
    write_line(task)
    task.retire("synthesis")
    rows = rows_of(synthesis.SCHEMA, 7, {(REJECTED, rejected): 2, (FAILED, "refused"): 1})
    common = {"task": "d" * 64, "model": "e" * 64, "seed": 0}
    finish(task, "synthesis", common, [], rows, synthesis.SCHEMA, surplus=1, **TOKENS)
    document, markdown = write_report(store.root)
    [found] = document["tasks"]
    assert len(found["lines"]) == lines
    assert found["num_outdated_lines"] == 1 - lines
    replaced = {one["stage"] for one in found["stages"] if one["inputs_replaced"]}
    assert replaced == (set() if lines else {"curation", "finetuning", "evaluation"})
    assert ("1 earlier comparison of stages that have been replaced" in markdown) == (not lines)


def test_a_changed_task_file_is_said(store: RunStore) -> None:
    task = store.task("colours")
    write_line(task)
    assert "earlier version" not in write_report(store.root)[1]
    write_line(task, digest="f" * 64)
    assert write_report(store.root)[1].count("of an earlier version") == 1


# ---- unfinished work


def begin_synthesis(task: TaskStore, shards: int) -> None:
    """A synthesis that was stopped after so many whole shards."""
    stage = task.stage("synthesis", {"seed": 99})
    with stage.writing():
        for shard in range(shards):
            rows = rows_of(synthesis.SCHEMA, SHARD_ROWS - 4, {(REJECTED, "empty"): 3, (FAILED, "refused"): 1})
            rows = [row | {"row": shard * SHARD_ROWS + row["row"]} for row in rows]
            stage.commit(rows, synthesis.SCHEMA)
            stage.log({"event": "shard", "rows": (shard + 1) * SHARD_ROWS, **TOKENS})


def test_a_killed_run_says_where_it_stands(store: RunStore) -> None:
    task = store.task("colours")
    begin_synthesis(task, shards=2)
    checkpoint = task.root / "finetuning" / ("0" * 16) / "work" / "trainer" / "checkpoint-12"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint.with_name("checkpoint-15")).mkdir()
    document, markdown = write_report(store.root)
    [found] = document["tasks"]
    training, writing = found["unfinished"]
    assert (writing["num_committed_rows"], writing["ledger"]["accepted"]) == (128, 120)
    assert writing["ledger"]["rejected"] == {"empty": 6}
    assert writing["output_tokens"] == 100
    assert writing["checkpoint_step"] is None
    assert (training["num_committed_rows"], training["checkpoint_step"], training["last_event"]) == (0, 12, None)
    assert (found["name"], found["kind"], found["lines"]) == ("colours", None, [])
    assert "Nothing has been compared yet." in markdown
    assert "step 12" in markdown


def test_a_stage_with_a_marker_is_finished_though_its_work_is_there(store: RunStore) -> None:
    """A kill between the marker and the removal of the work folder."""
    write_line(store.task("colours"))
    for path in store.task("colours").root.glob("*/*"):
        (path / "work").mkdir()
    assert read_report(store.root)["tasks"][0]["unfinished"] == []


def test_a_retired_stage_is_neither_finished_nor_unfinished(store: RunStore) -> None:
    task = store.task("colours")
    write_line(task)
    begin_synthesis(task, shards=1)
    task.retire("synthesis")
    [found] = read_report(store.root)["tasks"]
    assert found["unfinished"] == []
    assert "synthesis" not in {one["stage"] for one in found["stages"]}


def test_one_death_is_counted_once(store: RunStore) -> None:
    """Each call that was in flight writes an event of its own."""
    died = {"event": "engine_died", "alone": False, "blame": True, "rows": []}
    lives = [("engine-0", 1), ("engine-0", 1), ("engine-1", 1), ("engine-0", 2)]
    events = [{**died, "engine": engine, "life": life, "time": 10.0} for engine, life in lives]
    rows = rows_of(synthesis.SCHEMA, 3)
    finish(store.task("colours"), "synthesis", {}, [], rows, synthesis.SCHEMA, events, **TOKENS)
    [stage] = read_report(store.root)["tasks"][0]["stages"]
    assert stage["num_engine_deaths"] == 3


# ---- text from outside


EVIL = "a|b `c` <script>alert(1)</script> [x](javascript:1) **d** _e_ &lt; \x1b[31m \u202e\n# f\n\n| g |"


def test_task_text_is_shown_and_not_obeyed(store: RunStore) -> None:
    task = TASK | {"name": EVIL, "remarks": [EVIL], "output_language": EVIL}
    write_line(store.task("colours"), task=task, recipe=EVIL, student=EVIL, rejected=EVIL)
    write_line(store.task("more"))
    _, markdown = write_report(store.root)
    html = MarkdownIt("commonmark").enable("table").render(markdown)
    tags = set(re.findall(r"<(/?\w+)", html))
    allowed = {"h1", "h2", "h3", "p", "ul", "li", "code", "table", "thead", "tbody", "tr", "th", "td"}
    assert {tag.lstrip("/") for tag in tags} == allowed
    assert "\x1b" not in markdown
    assert "\u202e" not in markdown
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        rows = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd]", row)) for row in rows}) == 1
    # Twice in the overview; title, language, remark; the line's recipe and student; the ledger.
    assert html.count("alert(1)") == 8


def test_escaped_text_reads_as_it_was() -> None:
    for text in (EVIL, "task1516_imppres_nli", "__init__", "~~a~~ $x$ \\| {b} #1", "\\*a\\*", "5 < 6 & 7 > 2"):
        shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).renderInline(escape(text))
        plain = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
        assert plain == "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    assert not set("<>") & set(escape(EVIL))
    assert escape("task1516_imppres_nli") == "task1516_imppres_nli"


# ---- mistakes


def test_what_is_no_run_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    absent, empty, other = tmp_path / "absent", tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for folder, what in ((absent, "no such folder"), (empty, "is no run folder"), (other, "is no run folder")):
        with pytest.raises(UserError, match=what) as error:
            write_report(folder)
        assert str(folder) in str(error.value)
        assert "--out" in str(error.value)
    assert not absent.exists()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["notes.txt"]


def test_a_run_folder_without_a_stage_is_refused(store: RunStore) -> None:
    with pytest.raises(UserError, match="no stage has begun here"):
        read_report(store.root)
    store.task("colours").root.mkdir(parents=True)
    with pytest.raises(UserError, match="selfguide run TASK"):
        read_report(store.root)
