"""What a command's errors become: exit codes, one line or a traceback, and what the terminal gets to see."""

import argparse
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from stripe.cli import COMMANDS, main
from stripe.cli.process import dispatch, refusal
from stripe.messages import SCREEN
from stripe.recipe import Recipe
from tests.runs import record

ROOT = Path(__file__).parents[1]


def ended(run, capsys, *, shown=False):
    code = dispatch(lambda: argparse.Namespace(traceback=shown), run)
    return code, capsys.readouterr()


def raises(error):
    def run(arguments):
        raise error

    return run


def test_bad_input_is_one_line_and_2(capsys):
    code, said = ended(lambda _: Recipe(lr=-1.0), capsys)
    assert code == 2
    assert said.err == "error: lr -1.0: expected a finite number above 0\n"


def test_traceback_is_shown_on_request(capsys):
    code, said = ended(lambda _: Recipe(lr=-1.0), capsys, shown=True)
    assert code == 2
    assert "recipe.py" in said.err
    assert said.err.endswith("error: lr -1.0: expected a finite number above 0\n")


BUGS = {
    "an expression of ours": lambda _: Recipe(milestones=(None, 2)).learning_rate(1),
    "a library": lambda _: np.zeros(3) + np.zeros(4),
    "torch": lambda _: torch.zeros(2, 3) @ torch.zeros(2, 3),
    "a division": lambda _: 1 / 0,
    "None": lambda _: iter(None),
    "a key": lambda _: {}["gate"],
    "code elsewhere": raises(ValueError("not ours")),
    "a name": lambda _: undefined,  # noqa: F821
    "a file of ours that is missing": lambda _: __import__("stripe.absent"),
}


@pytest.mark.parametrize("run", BUGS.values(), ids=BUGS)
def test_a_bug_shows_its_traceback_says_that_it_is_one_and_is_1(run, capsys):
    code, said = ended(run, capsys)
    assert code == 1
    assert "Traceback" in said.err
    assert "this is a bug in stripe" in said.err.splitlines()[-1]
    assert "error: " not in said.err.splitlines()[-1]


WORLD = {
    "no file": lambda _: open("no/such/file"),
    "no memory": raises(MemoryError()),
    "no memory on the device": raises(torch.OutOfMemoryError("CUDA out of memory")),
    "a package that is not installed": lambda _: __import__("no_such_package"),
    "no connection": raises(ConnectionResetError("reset")),
}


@pytest.mark.parametrize("run", WORLD.values(), ids=WORLD)
def test_what_the_machine_lacks_is_no_bug(run, capsys):
    code, said = ended(run, capsys)
    assert code == 2
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ")


class Broken(torch.nn.Module):
    def forward(self, x):
        return self.missing(x)


@pytest.mark.parametrize(
    ("network", "words"),
    [(torch.nn.Linear(3, 2), "RuntimeError: mat1 and mat2"), (torch.nn.Sequential(Broken()), "no attribute 'missing'")],
)
def test_a_network_that_fails_on_its_input_is_named_as_such(network, words, capsys):
    code, said = ended(lambda _: network(torch.zeros(2, 5)), capsys)
    assert code == 2
    assert said.err.startswith("error: the network fails on its input, ")
    assert words in said.err
    assert len(said.err.splitlines()) == 1


def test_a_refusal_remains_one_when_another_thread_raised_it():
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(Recipe, epochs=0).exception()
    assert refusal(error) == "epochs 0, seed 0: expected at least 1 and at least 0"
    assert refusal(error, ("studies",)) is None


def test_the_terminal_is_not_steered(capsys):
    def run(arguments):
        print("gate \x1b]0;title\x07 \u202ex\ty")  # noqa: T201
        Recipe(scheduler="\x1b[2J" + "x" * 1_000_000)

    code, said = ended(run, capsys)
    assert code == 2
    assert said.out == "gate \\x1b]0;title\\x07 \\u202ex\ty\n"
    assert "\x1b" not in said.err
    assert "\\x1b[2J" in said.err
    assert len(said.err) <= len("error: \n") + SCREEN
    assert said.err.endswith("expected one of step, cosine, onecycle\n")


def test_keys_of_a_checkpoint_do_not_reach_the_terminal(tmp_path, capsys):
    evil = {f"layer{i}.\x1b]0;owned\x07\x1b[2J.fc1.weight": torch.zeros(4, 4) for i in range(2000)}
    torch.save({"state_dict": evil}, tmp_path / "evil.pt")
    assert main(["collect", "--ckpt", str(tmp_path / "evil.pt"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert not set("\x1b\x07") & set(said.out + said.err)
    assert len(said.err) <= len("error: \n") + SCREEN


def test_json_of_a_table_with_holes_is_json(tmp_path):
    record(tmp_path / "run", 1)
    assert main(["stats", str(tmp_path / "run"), "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert rows[0]["drift"] is None  # of the first epoch


# ---- processes -------------------------------------------------------------------------------------------


PIPED = "import sys; from stripe.cli import main; sys.argv = ['stripe', *{words!r}]; sys.exit(main())"


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [["--help"], ["stats", "{run}"]])
def test_a_reader_that_has_gone_is_silence(words, buffered, tmp_path):
    record(tmp_path / "run", 1)
    words = [word.format(run=tmp_path / "run") for word in words]
    command = [sys.executable, *(() if buffered else ("-u",)), "-c", PIPED.format(words=words)]
    usual = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=usual) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert said == ""
    assert process.returncode in ({141} if buffered or "stats" in words else {0})  # argparse passes over what fails


WAITING = """
import signal, sys, time
from stripe import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
def run(arguments):
    print("ready", flush=True)
    time.sleep(60)
cli.COMMANDS["stats"].run = run
sys.argv = ["stripe", "stats", "x"]
sys.exit(cli.main())
"""


def test_ctrl_c_is_130():
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "interrupted: what was finished is valid and kept\n"


LOST = """
import _thread, signal, sys, time
from stripe import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finalised:
    def __del__(self):
        _thread.interrupt_main()
        time.sleep(0)
def run(arguments):
    {how}
    time.sleep(2)
    print("went on")
cli.COMMANDS["stats"].run = run
sys.argv = ["stripe", "stats", "x"]
sys.exit(cli.main())
"""
WAYS = {
    "in a finaliser": "Finalised()",
    "turned into another error": "exec('try: _thread.interrupt_main(); time.sleep(2)\\nfinally: raise RuntimeError')",
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_ctrl_c_is_130_where_libraries_lose_it(how):
    done = subprocess.run([sys.executable, "-c", LOST.format(how=how)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: what was finished is valid and kept\n"


def test_ctrl_c_is_130_after_the_import_that_it_came_in(tmp_path):
    (tmp_path / "library.py").write_text(
        "import _thread, time\n_thread.interrupt_main()\ntime.sleep(0.1)\nprint('whole')"
    )
    command = [sys.executable, "-c", LOST.format(how="import library")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "whole\n")
    assert done.stderr == "interrupted: what was finished is valid and kept\n"


def test_ctrl_c_before_the_command_begins_is_told_too():
    early = "cli.process.keep_memory = _thread.interrupt_main\n"
    code = LOST.format(how="pass").replace("def run", f"{early}def run")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: what was finished is valid and kept\n"


@pytest.mark.parametrize("script", ["benchmark.py", "study.py"])
def test_scripts_end_as_commands_do(script):
    words = {
        "benchmark.py": ["coverage", "--models", "no/such"],
        "study.py": ["constancy", "no/such/run", "--out", "no/such/out"],
    }[script]
    command = [sys.executable, ROOT / "scripts" / script, *words]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert plain.stderr.startswith("error: ")
    assert len(plain.stderr.splitlines()) == 1
    shown = subprocess.run([*command, "--traceback"], capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.endswith(plain.stderr)


def test_every_command_takes_traceback(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert "--traceback" in capsys.readouterr().out
