"""The command line: light until a verb needs more, exit codes that mean something, errors on one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfguide import api, cli
from selfguide.errors import TaskFailed, UserError
from selfguide.recipefile import shipped_recipes
from selfguide.text import printable

EXAMPLES = Path(cli.__file__).parent / "examples"
HEAVY = {"torch", "vllm", "ray", "transformers", "trl", "peft", "polars"}
SPY = """
import json, sys
sys.argv = {argv!r}
try:
    {code}
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
MAIN = "from selfguide.cli import main; main()"
EVERY_HELP = """
    import typer.main
    from selfguide.cli import app
    def walk(command, *path):
        print(" ".join(path))
        for name, child in getattr(command, "commands", {}).items():
            walk(child, *path, name)
        command.main(["--help"], prog_name=" ".join(path), standalone_mode=False)
    walk(typer.main.get_command(app), "selfguide")
"""


def loaded(code: str, *argv: str) -> tuple[str, set[str]]:
    """Standard output and the modules that are loaded at the end, in a process of its own."""
    script = SPY.format(argv=["selfguide", *argv], code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "argv", "said"),
    [
        (MAIN, ["--help"], "recipes"),
        (MAIN, ["recipes"], "paper"),
        (MAIN, ["recipes", "paper"], '"round_size": 10'),
        (MAIN, ["recipes", "--fields"], "synthesis.lag"),
        ("import selfguide; print(selfguide.__version__)", [], "0."),
        (EVERY_HELP, [], "selfguide run"),
    ],
    ids=["help", "recipes", "one recipe", "fields", "import", "every help"],
)
def test_nothing_heavy_is_loaded_before_a_verb_needs_it(code: str, argv: list[str], said: str) -> None:
    out, modules = loaded(code, *argv)
    assert said in out
    assert "selfguide" in modules
    assert not HEAVY & modules


def test_a_tokenizer_is_loaded_without_pytorch(random_student: Path) -> None:
    out, modules = loaded(MAIN, "validate", str(EXAMPLES / "sentiment.json"), "--model", str(random_student))
    assert "sentiment" in out
    assert "transformers" in modules
    assert "torch" not in modules


Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Runs the console script in this process: exit code, standard output, standard error."""

    def run_main(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selfguide", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run_main


@pytest.fixture
def run_ends(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Lets `selfguide run` end with an exception, after its arguments were read."""

    def end_with(error: BaseException) -> None:
        async def run(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(api, "run", run)

    return end_with


def one_line(text: str) -> str:
    """The one line that a user reads: nothing in it that a terminal obeys."""
    assert text.endswith("\n")
    assert text[:-1].isprintable(), text
    return text[:-1]


def test_a_shipped_recipe_is_listed_and_shown_whole(main: Main) -> None:
    code, out, err = main("recipes")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_recipes())
    code, out, _ = main("recipes", "paper", "--set", "seed=5")
    assert (code, json.loads(out)["seed"]) == (0, 5)


def test_a_task_that_came_to_no_end_is_exit_code_1(main: Main, run_ends: Callable[[BaseException], None]) -> None:
    run_ends(TaskFailed("time_first: 0 of 3 candidates are left"))
    code, out, err = main("run", EXAMPLES / "time_first.json")
    assert (code, out) == (1, "")
    assert one_line(err) == "selfguide: time_first: 0 of 3 candidates are left"


def test_a_stop_by_the_user_is_exit_code_130(main: Main, run_ends: Callable[[BaseException], None]) -> None:
    run_ends(KeyboardInterrupt())
    assert main("run", EXAMPLES / "time_first.json")[0] == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run_ends: Callable[[BaseException], None]) -> None:
    run_ends(ZeroDivisionError("a bug"))
    monkeypatch.setattr(sys, "argv", ["selfguide", "run", str(EXAMPLES / "time_first.json")])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["recipes", "papr"], "did you mean paper?"),
        (["recipes", "paper", "--set", "synthesis.lagg=1"], "did you mean lag?"),
        (["recipes", "paper", "--set", "synthesis"], "write key=value"),
        (["run", "none.json"], "none.json: there is no such file"),
        (["run", EXAMPLES / "time_first.json", "--recipe", "none.yaml"], "cannot be read"),
        (["run", EXAMPLES / "time_first.json", "--set", "seed=["], "--set seed"),
        (["run", EXAMPLES / "time_first.json"], "no student: name one with --model"),
        (["run", EXAMPLES / "time_first.json", "--model", "/none"], "/none"),
    ],
)
def test_a_mistake_that_the_user_can_mend_is_exit_code_2(main: Main, argv: list[object], said: str) -> None:
    code, out, err = main(*argv)
    assert (code, out) == (2, "")
    assert one_line(err).startswith("selfguide: ")
    assert said in err


@pytest.mark.parametrize("argv", [["nonsense"], ["run"], ["recipes", "--nonsense"], ["run", "x.json", "--kind", "odd"]])
def test_a_command_that_cannot_be_read_is_exit_code_2(main: Main, argv: list[str]) -> None:
    code, out, err = main(*argv)
    assert (code, out) == (2, "")
    assert "Usage: " in err


HOSTILE = "\x1b[2Jx\x1b]0;title\x07\r\u202eevil\x85\u2028\x00"


def test_a_terminal_obeys_nothing_that_an_error_quotes(main: Main, tmp_path: Path) -> None:
    name, key = HOSTILE.replace("\x00", ""), json.dumps(HOSTILE + "\n")
    recipe, task = tmp_path / f"{name}.yaml", tmp_path / f"{name}.json"
    recipe.write_text(f"{key}: 1")
    task.write_text(f'{{"instruction": "x", "examples": [], {key}: 1}}')
    for argv in (
        ["recipes", HOSTILE],
        ["recipes", recipe],
        ["recipes", tmp_path / "none" / recipe.name],
        ["recipes", "paper", "--set", f"{HOSTILE}=1"],
        ["recipes", "paper", "--set", f"seed={json.dumps(HOSTILE)}"],
        ["run", task],
        ["run", tmp_path / "none" / task.name],
    ):
        code, _, err = main(*argv)
        assert code == 2
        assert "evil" in one_line(err)


@pytest.mark.parametrize("error", [UserError, TaskFailed])
def test_messages_of_any_origin_are_made_safe(
    main: Main, run_ends: Callable[[BaseException], None], error: type[Exception]
) -> None:
    run_ends(error(f"first\nsecond {HOSTILE}"))
    _, _, err = main("run", EXAMPLES / "time_first.json")
    assert one_line(err).startswith(r"selfguide: first\nsecond \x1b[2Jx\x1b]0;title\x07\r\u202eevil\x85\u2028\x00")


def test_printable_text_stays_as_it_is() -> None:
    assert printable("naïve 日本 🙂 text") == "naïve 日本 🙂 text"
    assert printable("a\tb") == r"a\tb"
