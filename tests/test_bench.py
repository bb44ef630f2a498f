"""The suite of benchmarks: what its check names, what it leaves behind, and that the page is what the results make."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_filters, performance, suite
from benchmarks.bench_lag import distinct_n
from benchmarks.dummy_model import Shape, make_dummy_model
from benchmarks.ratio import ratio
from selfguide.api import load_student
from selfguide.recipefile import load_recipe

REPO = Path(__file__).parents[1]
HERE = "2x-some-processor"
MODULES = sorted(
    {entry.module for entry in suite.SUITE.values()} | {"authors_flow", "dummy_model", "performance", "suite"}
)


@pytest.mark.parametrize("module", MODULES)
def test_every_script_shows_help(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    script = importlib.import_module(f"benchmarks.{module}")
    with pytest.raises(SystemExit) as end:
        script.main()
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert " ".join((script.__doc__ or "").split()) in " ".join(said.split())


def write_result(out: Path, name: str, ratios: dict[str, Any], **more: Any) -> None:
    out.mkdir(exist_ok=True)
    facts = {"size": "quick", "arguments": "--quick", "hardware": HERE, "seconds": 1.0}
    result = {**facts, "environment": {"git_commit": "c0ffee"}, "ratios": ratios, **more}
    (out / f"{name}.json").write_text(json.dumps(result))


def run_suite(verb: str, tmp_path: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "benchmarks.suite", verb, "--out", str(tmp_path / "out")]
    command += ["--baselines", str(tmp_path / "baselines")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_the_check_names_what_is_out_of_bounds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_result(out, "trainers", {"warm": ratio([2.0, 2.5, 3.0], floor=2.0)})
    write_result(out, "filters", {"inputs": ratio([2.0, 2.0], ceiling=3.0)})
    assert run_suite("check", tmp_path)[0] == 0
    write_result(out, "trainers", {"warm": ratio([1.8, 1.9, 3.0], floor=2.0), "cold": ratio([2.0], floor=2.0)})
    write_result(out, "filters", {"inputs": ratio([3.5, 3.0, 3.2], ceiling=3.0), "told": ratio([0.1])})
    code, said = run_suite("check", tmp_path)
    assert code == 1
    assert "trainers warm: 1.9 is below its floor 2" in said
    assert "filters inputs: 3.2 is above its ceiling 3" in said
    assert "cold" not in said
    assert "told" not in said


def test_the_check_names_what_fell_below_this_hardwares_baseline(tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept = {"warm": ratio([9.5, 10.0, 10.5], floor=2.0), "cost": ratio([1.0, 1.0], ceiling=3.0)}
    write_result(out, "trainers", kept)
    assert run_suite("keep", tmp_path)[0] == 0
    write_result(out, "trainers", {"warm": ratio([9.1, 9.1], floor=2.0), "cost": ratio([0.5], ceiling=3.0)})
    assert run_suite("check", tmp_path)[0] == 0
    fallen = {"warm": ratio([8.9, 8.9], floor=2.0), "cost": ratio([1.1, 1.1], ceiling=3.0)}
    write_result(out, "trainers", fallen)
    code, said = run_suite("check", tmp_path)
    assert code == 1
    assert "trainers warm: 8.9, the baseline 10" in said
    assert "trainers cost: 1.1, the baseline 1" in said
    write_result(out, "trainers", fallen, arguments="--other")
    assert run_suite("check", tmp_path)[0] == 0
    write_result(out, "trainers", fallen, hardware="1x-another")
    assert run_suite("check", tmp_path)[0] == 0


def test_a_failed_benchmark_is_written_down_and_the_suite_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(suite.SUITE, "absent", suite.Entry("bench_absent", "is not there"))
    args = Namespace(out=tmp_path / "out", only=["absent", "store"], size="quick", ni=None, model=None)
    assert suite.run(args) == 1
    results = {path.stem: json.loads(path.read_text()) for path in args.out.iterdir()}
    assert results["absent"]["failed"] == "exit code 1"
    assert "failed" not in results["store"]
    assert results["store"]["environment"]["num_cpus"]
    assert results["store"]["config"]["stages"] == 20
    assert len(results["store"]["ratios"]["stage_over_bare_write"]["values"]) == 5
    assert [*suite.complaints("absent", results["absent"], tmp_path)] == ["absent: failed, exit code 1"]


def test_the_page_is_what_the_kept_results_make() -> None:
    files = performance.render(suite.BASELINES, REPO / "docs")
    assert {path: path.read_text() for path in files} == files, "python -m benchmarks.performance"
    assert set((REPO / "docs" / "pictures").glob("*.svg")) == {path for path in files if path.suffix == ".svg"}


def test_the_page_shows_what_was_missed(tmp_path: Path) -> None:
    (tmp_path / "performance.md").write_text(f"above\n{performance.BEGIN}\nold\n{performance.END}\nbelow\n")
    write_result(tmp_path / "out", "filters", {"in_puts": ratio([2.0, 4.0, 3.5], ceiling=3.0)})
    assert run_suite("keep", tmp_path)[0] == 0
    files = performance.render(tmp_path / "baselines", tmp_path)
    page = files[tmp_path / "performance.md"]
    assert page.startswith("above\n")
    assert page.endswith("\nbelow\n")
    assert "old" not in page
    assert "| `filters` | in puts | 3.50 | 2.00 to 4.00 | 3 | at most 3 **missed** |" in page
    picture = ElementTree.fromstring(files[tmp_path / "pictures" / f"{HERE}-quick.svg"])
    assert any(one.text == "filters: in puts" for one in picture.iter("{http://www.w3.org/2000/svg}text"))


def test_filters_by_hand_keep_the_rows_that_ours_keep() -> None:
    kept = {}
    for name, (table, ours, by_hand) in bench_filters.pieces(3000).items():
        kept[name] = ours(table)
        assert kept[name] == by_hand(table), name
    assert all(0 < len(rows) < 3000 for rows in kept.values())


def test_a_dummy_student_of_any_shape_writes_lines_of_letters(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shape = Shape(128, 256, 2, 4, 2, 1000, 512)
    make_dummy_model(tmp_path / "dummy", shape)
    student = load_student(load_recipe("smoke", {"model.path": str(tmp_path / "dummy")}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dummy", dtype=torch.float32)
    ids = torch.tensor([student.tokenizer.encode("Input: a river")])
    with torch.no_grad():
        shares = torch.softmax(model(ids).logits[0, -1], -1)
    letters = sum(float(shares[student.tokenizer.encode(one)[0]]) for one in "etaoin \n")
    assert letters > 0.5
    assert float(shares[259:].sum()) < 1e-6


def test_distinct_n_counts_ngrams() -> None:
    assert distinct_n([["a", "b", "a", "b"]], 2) == pytest.approx(2 / 3)
    assert math.isclose(distinct_n([["a"], ["a"]], 1), 0.5)
    assert distinct_n([["a"]], 2) == 0
