from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from typer.testing import CliRunner, Result

from selfguide import metrics
from selfguide.cli import app
from selfguide.errors import UserError
from selfguide.gpt2 import load_gpt2
from selfguide.scoring import score_file
from selfguide.tasks import find_tasks, load_task

ROWS: list[dict[str, Any]] = [
    {"task": "t1", "prediction": "Yes.", "references": ["yes", "no"], "category": "Textual Entailment"},
    {"task": "t1", "prediction": "maybe", "references": "no", "category": "Textual Entailment"},
    {"task": "t1", "references": ["no"], "category": "Textual Entailment"},
    {"task": "t2", "prediction": "the cat sat", "references": ["a cat sat"], "language": "English"},
    {"task": "t2", "prediction": None, "references": ["x"], "category": "Title Generation"},
]
WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write_file(*rows: object, name: str = "predictions.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write_file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, arguments)], catch_exceptions=False)


def test_scores_are_micro_averages(write_rows: WriteRows) -> None:
    document = score_file(write_rows(*ROWS))
    assert document["num_rows"] == 5
    [track] = document["tracks"].values()
    assert track["overall"] == {"n": 5, "exact_match": 20.0, "rouge_l": 33.3333}
    assert track["tasks"] == {
        "t1": {"n": 3, "exact_match": 33.3333, "rouge_l": 33.3333},
        "t2": {"n": 2, "exact_match": 0.0, "rouge_l": 33.3333},
    }
    assert track["categories"] == {
        "textual_entailment": {"n": 3, "exact_match": 33.3333, "rouge_l": 33.3333},
        "title_generation": {"n": 1, "exact_match": 0.0, "rouge_l": 0.0},
    }


def test_missing_predictions_are_noticed(write_rows: WriteRows) -> None:
    path = write_rows(*ROWS)
    assert "2 of 5 predictions are missing: they count as empty answers" in score_file(path)["notices"]
    result = run(path)
    assert result.exit_code == 0
    assert result.stderr.startswith("notice: 2 of 5 predictions are missing")
    assert "notice" not in result.stdout
    assert (
        score_file(write_rows({"task": "a", "references": [""]}))["tracks"]["default"]["overall"]["exact_match"] == 100
    )


def test_without_a_language_rows_are_english_and_it_is_said(write_rows: WriteRows) -> None:
    assert "4 of 5 rows state no language: they are taken as English" in score_file(write_rows(*ROWS))["notices"]
    assert score_file(write_rows(ROWS[3]))["notices"] == []


def official_means(rows: list[tuple[str, tuple[str, ...]]]) -> dict[str, float]:
    """The official script's sums, with its own ROUGE library."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    em = rouge = 0.0
    for prediction, references in rows:
        em += max(metrics.normalize(prediction) == metrics.normalize(one) for one in references)
        rouge += max(scorer.score(one, prediction)["rougeL"].fmeasure for one in references)
    means = {"exact_match": round(100 * em / len(rows), 4), "rouge_l": round(100 * rouge / len(rows), 4)}
    return {"n": len(rows), **means}


def test_scores_equal_the_official_on_real_rows(ni_v2_dir: Path, write_rows: WriteRows) -> None:
    rng, groups = random.Random(0), dict[str, list[tuple[str, tuple[str, ...]]]]()
    categories: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    rows = []
    for path in find_tasks([ni_v2_dir])[::60]:
        task = load_task(path)
        if {task.input_language, task.output_language} != {"English"}:
            continue
        for row in task.instances[: rng.randint(5, 40)]:
            words = row.references[0].split()
            answer = rng.choice([" ".join(words[: 1 + len(words) // 2]), rng.choice(task.instances).references[0]])
            groups.setdefault(task.name, []).append((answer, row.references))
            categories.setdefault("_".join(task.category.lower().split()), []).append((answer, row.references))
            rows.append({"task": task.name, "prediction": answer, "references": list(row.references)})
    document = score_file(write_rows(*rows), ni_v2_dir)
    assert len(groups) > 10
    assert document["notices"] == []
    [track] = document["tracks"].values()
    assert track["tasks"] == {name: official_means(found) for name, found in sorted(groups.items())}
    assert track["categories"] == {name: official_means(found) for name, found in sorted(categories.items())}
    assert track["overall"] == official_means([one for found in groups.values() for one in found])
    assert len({means["rouge_l"] for means in track["tasks"].values()}) > 10


def test_the_tasks_files_say_category_and_language(ni_v2_dir: Path, write_rows: WriteRows) -> None:
    names = {"Estonian": "", "English": ""}
    for path in find_tasks([ni_v2_dir])[::-1]:
        task = load_task(path)
        if task.input_language in names and task.output_language == "English":
            names[task.input_language] = task.name
        if all(names.values()):
            break
    rows = [{"task": name, "prediction": "A", "references": ["A"]} for name in names.values()]
    document = score_file(write_rows(*rows, {"task": "own", "prediction": "A", "references": "A"}), ni_v2_dir)
    # As in the official tracks: a task is English where both its sides are.
    assert list(document["tracks"]["xlingual"]["tasks"]) == [names["Estonian"]]
    assert list(document["tracks"]["default"]["tasks"]) == sorted([names["English"], "own"])
    assert sum(means["n"] for means in document["tracks"]["xlingual"]["categories"].values()) == 1
    assert "no file under --tasks is of own" in document["notices"]


HINDI = {"task": "t3", "prediction": "हाँ जी", "references": ["हाँ"], "language": "Hindi"}


def test_other_languages_have_no_rouge_without_gpt2(write_rows: WriteRows) -> None:
    path = write_rows(*ROWS, HINDI | {"prediction": "हाँ"})
    document = score_file(path)
    assert document["tracks"]["xlingual"]["overall"] == {"n": 1, "exact_match": 100.0, "rouge_l": None}
    assert document["tracks"]["default"]["overall"] == score_file(write_rows(*ROWS))["tracks"]["default"]["overall"]
    text = run(write_rows(HINDI)).stdout
    assert text.splitlines()[-1].split() == ["all", "1", "0.0000", "unavailable"]
    assert "no ROUGE-L for what is not English (t3): it needs GPT-2's tokenizer, --gpt2 FOLDER" in document["notices"]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny byte-level BPE in GPT-2's two formats, in two folders: `whole` and `parts`."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["हाँ जी हाँ नहीं the cat sat on the mat"] * 20, vocab_size=320, min_frequency=2)
    for name in ("whole", "parts"):
        (folder / name).mkdir()
    tokenizer.save(str(folder / "whole" / "tokenizer.json"))
    tokenizer.save_model(str(folder / "parts"))
    return folder


def test_gpt2_scores_other_languages(gpt2_folder: Path, write_rows: WriteRows) -> None:
    path = write_rows(HINDI)
    for name in ("whole", "parts"):
        gpt2 = load_gpt2(str(gpt2_folder / name))
        document = score_file(path, gpt2=gpt2)
        ours, theirs = gpt2("हाँ जी"), gpt2("हाँ")
        assert ours[: len(theirs)] == theirs
        expected = 2 * len(theirs) / (len(ours) + len(theirs))
        assert document["tracks"]["xlingual"]["overall"]["rouge_l"] == pytest.approx(100 * expected, abs=1e-4)
        assert 0 < expected < 1
        assert (
            f"the tokenizer has {gpt2.num_tokens} tokens, GPT-2's 50,257: this ROUGE-L is not the official"
            in (document["notices"])
        )
    assert "unavailable" not in run(path, "--gpt2", gpt2_folder / "whole").stdout


def test_gpt2_tokens_are_those_of_the_official_evaluation(gpt2_folder: Path) -> None:
    from transformers import GPT2Tokenizer

    official = GPT2Tokenizer.from_pretrained(str(gpt2_folder / "parts"))
    for text in ("the cat sat", " the  cat\n\n sat on", "हाँ जी", "東京 - ok.", "", " ", "it's 100% the_mat"):
        expected = [token.lstrip("Ġ") for token in official.tokenize(text)]
        for name in ("whole", "parts"):
            assert load_gpt2(str(gpt2_folder / name))(text) == expected
    assert "" in load_gpt2(str(gpt2_folder / "parts"))("a  b")  # a lone marker leaves an empty token, as there


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no tokenizer is there"),
        ({"vocab.json": "{}"}, "no tokenizer is there"),
        ({"tokenizer.json": "{}"}, "the tokenizer cannot be read"),
        ({"vocab.json": "[", "merges.txt": ""}, "the tokenizer cannot be read"),
    ],
)
def test_a_folder_without_gpt2_is_named(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=expected) as error:
        load_gpt2(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(error.value)


def test_the_authors_metrics_keep_their_own_names(write_rows: WriteRows) -> None:
    rows = [
        {"task": "a", "prediction": "I say Yes", "references": ["Yes", "No"]},
        {"task": "a", "prediction": "No", "references": ["No"]},
        {"task": "b", "prediction": "Yes", "references": ["True"]},
    ]
    path = write_rows(*rows)
    document = score_file(path, authors=True)
    tasks = document["tracks"]["default"]["tasks"]
    # Labels are a task's own: "Yes" is none of b's.
    assert [tasks[name]["authors_em"] for name in "ab"] == [100.0, 0.0]
    assert tasks["a"]["exact_match"] == 50.0
    characters = [metrics.authors_rouge_char(row["prediction"], row["references"]) for row in rows[:2]]  # type: ignore[arg-type]
    assert tasks["a"]["authors_rouge_char"] == pytest.approx(50 * sum(characters), abs=1e-4)
    assert "authors_em" not in score_file(path)["tracks"]["default"]["overall"]
    assert run(path, "--authors").stdout.splitlines()[1].split()[-2:] == ["authors_em", "authors_rouge_char"]


GOOD = ROWS[0]
BROKEN: list[tuple[object, str]] = [
    ("{", "line 2 is not JSON"),
    ("[" * 100_000, "line 2 is not JSON"),
    ("9" * 5000, "line 2 is not JSON"),
    ([], "line 2 holds a list: write an object"),
    ("null", "line 2 holds null: write an object"),
    ({"prediction": "x", "references": ["x"]}, "line 2: task is missing or empty"),
    (GOOD | {"task": ""}, "line 2: task is missing or empty"),
    (GOOD | {"task": 5}, "line 2: task is a number: write it as text in quotes"),
    (GOOD | {"prediction": 5}, "line 2: prediction is a number"),
    (GOOD | {"prediction": ["x"]}, "line 2: prediction is a list"),
    (GOOD | {"prediction": True}, "line 2: prediction is true or false"),
    (GOOD | {"references": None}, "line 2: references is missing or empty"),
    (GOOD | {"references": []}, "line 2: references is missing or empty"),
    (GOOD | {"references": {}}, "line 2: references is a mapping: write a text or a list of texts"),
    (GOOD | {"references": ["a", 1]}, "line 2: references[1] is a number"),
    (GOOD | {"references": ["a", None]}, "line 2: references holds null"),
    (GOOD | {"category": ["x"]}, "line 2: category is a list"),
    (GOOD | {"language": 1}, "line 2: language is a number"),
    ('{"task": "a", "prediction": "\\ud800", "references": "x"}', "line 2: prediction holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("row", "expected"), BROKEN)
def test_a_broken_line_is_named(write_rows: WriteRows, row: object, expected: str) -> None:
    path = write_rows(GOOD, row)
    with pytest.raises(UserError) as error:
        score_file(path)
    assert str(error.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(error.value)


def test_files_that_hold_no_rows(write_rows: WriteRows, tmp_path: Path) -> None:
    for path, expected in {
        write_rows("", " ", name="empty.jsonl"): "there is no row in it",
        tmp_path / "absent.jsonl": "cannot be read",
        tmp_path: "cannot be read",
    }.items():
        with pytest.raises(UserError, match=expected):
            score_file(path)
    (tmp_path / "latin.jsonl").write_bytes('{"task": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        score_file(tmp_path / "latin.jsonl")
    assert score_file(write_rows("\ufeff" + json.dumps(GOOD), "", json.dumps(GOOD)))["num_rows"] == 2


def test_json_is_the_document(write_rows: WriteRows) -> None:
    path = write_rows(*ROWS, HINDI)
    assert json.loads(run(path, "--json").stdout) == score_file(path)


def test_text_from_files_is_neither_markup_nor_obeyed(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    hostile = "[red]x[/red]\x1b[31mred"
    text = run(write_rows(GOOD | {"task": hostile, "category": hostile})).stdout
    assert r"[red]x[/red]\x1b[31mred" in text
    assert "\x1b[31mred" not in text
