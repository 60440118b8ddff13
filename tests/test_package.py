"""The package as a whole: what imports what, what start-up loads, what the install files promise."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import stripe
from stripe import cli
from stripe.cli import process

ROOT = Path(__file__).parents[1]
GROUND = {"devices", "files", "gate", "memory", "messages", "recipe", "torch_internals"}
"""Rooms that import nothing of stripe, and that every room may import."""
ALLOWED = {
    "stats": set(),
    "locks": set(),
    "store": {"locks", "stats"},
    "gates": set(),
    "data": {"store"},
    "attention": set(),
    "checkpoints": {"pickles"},
    "capture": set(),
    "pickles": set(),
    "resuming": {"checkpoints", "locks"},
    "training": {"capture", "checkpoints", "resuming"},
    "asr.layers": set(),
    "models": {"attention", "asr.layers", "checkpoints"},
    "recorder": {"gates", "store"},
    "cluster": {"stats", "store"},
    "examples": {"store"},
    "timing": set(),
    "folding": {"gates", "stats", "timing", "training"},
    "graphs": {"folding", "gates", "stats", "store"},
    "plots": {"stats"},
    "figures": {"store", "stats", "plots"},
    "report": {"store", "stats", "plots"},
    "tracking": {"store", "stats", "plots", "figures"},
    "asr.convert": {"attention", "asr.layers", "gates", "folding"},
    "asr.annealing": {"gates"},
    "asr.psi": {"gates", "folding", "stats"},
    "asr.task": {"asr.layers", "training", "gates", "folding"},
    "asr.protocols": {"asr.layers", "asr.psi", "asr.task", "gates", "stats", "training"},
    "asr.validation": {"asr.protocols", "asr.task", "store", "stats"},
}


def room_of(module):
    """stripe.models.zoo -> models, stripe.asr.layers -> asr.layers, stripe -> ''."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["asr"] else 1])


def is_for_types(node):
    """Whether a node is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(node):
    """Every module or name of stripe that a syntax tree imports when it is run, wherever the import stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "stripe")
        elif isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "stripe":
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not is_for_types(child):
            yield from imports_of(child)


def imported_rooms(path):
    """The rooms that a file imports, also inside functions."""
    yield from (room_of(name) for name in imports_of(ast.parse(path.read_text())))


def name_of(path):
    """stripe/gates/graph.py -> stripe.gates.graph, stripe/gates/__init__.py -> stripe.gates."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def files_of(room):
    path = ROOT / "stripe" / room.replace(".", "/")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def rooms():
    found = {room_of(name_of(path)) for path in (ROOT / "stripe").rglob("*.py")}
    return found - {"", "__main__", "cli", "asr"}


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_imports_only_what_it_may(room):
    found = {each for file in files_of(room) for each in imported_rooms(file)} - {room}
    assert found <= (ALLOWED[room] | GROUND if room in ALLOWED else set())


def test_every_room_has_its_rule():
    assert rooms() <= set(ALLOWED) | GROUND


def test_the_rules_hold_no_circle():
    left = {room: set(may) for room, may in ALLOWED.items()}
    while leaves := [room for room, may in left.items() if not may & left.keys()]:
        for room in leaves:
            del left[room]
    assert not left


def test_no_modules_import_each_other_in_a_circle():
    paths = {name_of(path): path for path in (ROOT / "stripe").rglob("*.py")}
    left = {name: set() for name in paths}
    for name, path in paths.items():
        for imported in imports_of(ast.parse(path.read_text())):
            left[name].add(imported if imported in paths else imported.rpartition(".")[0])
    while leaves := [name for name, imported in left.items() if not (imported - {name}) & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left


def test_the_reader_of_imports_sees_them_all():
    code = """
import stripe.memory, os
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import stripe.report
def f():
    with open("x"):
        from stripe.asr import layers
class A:
    def g(self):
        import stripe.stats as s
"""
    assert {room_of(name) for name in imports_of(ast.parse(code))} == {"memory", "asr.layers", "stats"}


def body_lines(function):
    """How many lines a function has, its docstring left out."""
    document = function.body[0] if ast.get_docstring(function) is not None else None
    return function.end_lineno - function.lineno + 1 - (document.end_lineno - document.lineno + 1 if document else 0)


@pytest.mark.parametrize("folder", ["stripe", "scripts"])
def test_modules_and_functions_are_short(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        code = path.read_text()
        assert len(code.splitlines()) <= 450, path
        functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
        assert [f"{path.name}: {each.name}" for each in functions if body_lines(each) > 60] == []


def test_lines_of_a_function_are_counted_without_its_docstring():
    code = 'def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n'
    assert body_lines(ast.parse(code).body[0]) == 3


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def loaded_by(module):
    return set(python(f"import sys, {module}; print('\\n'.join(sys.modules))").split())


def test_reading_and_analysing_and_the_rules_of_finding_never_import_torch():
    rooms = ["stats", "store", "plots", "figures", "report", "graphs", "cli", "gates.rules", "gates.finding"]
    code = f"import importlib, sys\nfor room in {rooms}:"
    code += "\n    importlib.import_module('stripe.' + room); print(room, 'torch' in sys.modules)"
    loads = dict(line.split() for line in python(code).splitlines())
    assert loads.pop("gates.finding") == "True"  # the control
    assert [room for room, torch in loads.items() if torch == "True"] == []


def test_import_stripe_loads_nothing_heavy():
    assert not loaded_by("stripe") & {"torch", "numpy", "pandas", "matplotlib", "pyarrow"}


def test_public_names_come_from_their_homes():
    for name in stripe.__all__:
        assert getattr(stripe, name) is not None
    assert set(dir(stripe)) == set(stripe.__all__)
    private = {"capture", "cli", "devices", "files", "locks", "memory", "messages", "pickles", "resuming", "timing"}
    private |= {"torch_internals"}
    assert {room.split(".")[0] for room in rooms()} - private <= set(stripe.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'find_gate'; expected one of Gate"):
        _ = stripe.find_gate


def test_names_are_reached_after_import_stripe_alone():
    names = ["checkpoints.__doc__", "cluster.summarize_on", "recorder.Recorder", "RecorderCallback"]
    code = [f"assert stripe.{name} is not None" for name in names]
    assert python("\n".join(["import stripe", *code, "print('reached')"])) == "reached\n"


def test_versions_agree():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == stripe.__version__


CONDA_NAMES = {"pytorch": "torch", "python-duckdb": "duckdb", "dask": "dask[distributed]", "moto": "moto[server]"}


def test_environment_and_pyproject_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {f"python{project['requires-python']}", *project["dependencies"]}
    wanted |= {each for extra in project["optional-dependencies"].values() for each in extra}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [each["pip"] for each in environment if isinstance(each, dict)]
    listed = {each for each in [*environment, *pip] if isinstance(each, str)} - {"pip", "--editable ."}
    listed = {f"{CONDA_NAMES.get(each.split('>=')[0], each.split('>=')[0])}>={each.split('>=')[1]}" for each in listed}
    assert listed == {each for each in wanted if not each.startswith("stripe-observation")}
    assert not any("torch" in each and "<" in each for each in wanted)


HELP = """
import runpy, sys
sys.argv = [sys.argv[0], "--help"]
sys.path.insert(0, {folder!r})
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as ended:
    print(ended.code, *sys.modules)
"""


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_help_loads_nothing_heavy(script):
    code, *loaded = python(HELP.format(folder=str(script.parent), script=str(script))).splitlines()[-1].split()
    assert code == "0"
    assert "argparse" in loaded
    assert not set(loaded) & {"torch", "numpy", "pandas", "matplotlib", "pyarrow"}


FAULTS = """
import resource, numpy, stripe
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        numpy.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
assert stripe.keep_memory()
print(usual, faults())
"""
"""Counts the pages that twenty arrays of 64 MB fetch, where what is freed is not kept and where it is."""


TRAINING = """
import tempfile, torch
from stripe.recipe import Recipe
from stripe.training import fit
class Batches(list):
    samples = 4
    def set_epoch(self, epoch): pass
batches = Batches([(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64))])
with tempfile.TemporaryDirectory() as folder:
    fit(torch.nn.Linear(3, 2), batches, None, Recipe(epochs=1), directory=folder, description={}, progress=False)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
@pytest.mark.parametrize("before", ["", TRAINING], ids=["at once", "after a training"])
def test_memory_is_kept_when_asked_for_and_not_by_training(before):
    usual, kept = map(int, python(before + FAULTS).split())
    assert kept < usual / 5


def test_commands_keep_memory_only_in_a_process_of_their_own(monkeypatch):
    kept = []
    monkeypatch.setattr(process, "keep_memory", lambda: kept.append(True))
    monkeypatch.setattr(sys, "argv", ["stripe", "stats", "no/such/run"])
    assert cli.main(["stats", "no/such/run"]) == 2
    assert not kept
    assert cli.main() == 2
    assert kept


def pip(*words):
    return subprocess.run([sys.executable, "-m", "pip", *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_pip_section_of_the_environment_is_a_requirements_file(tmp_path):
    """Conda hands the section to pip as a file; what it asks for beside this package is what conda does not have."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [lines] = [each["pip"] for each in environment if isinstance(each, dict)]
    file = tmp_path / "section.txt"
    words = ["install", "--dry-run", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-r", str(file)]
    others = [line for line in lines if line != "--editable ."]  # installed already, or else an index would be needed
    for content, works in ((["--editable ."], True), (others, True), (["--no-deps --editable ."], False)):
        file.write_text("\n".join(content))
        assert (pip(*words).returncode == 0) is works, content
    assert len(others) == len(lines) - 1


def tracked():
    """What git tracks, as paths; skipped in a source distribution, which has no git."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git: this is a source distribution already")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def build(form, tree):
    """Build a distribution, sdist or wheel, from a copy of what git tracks; return its path."""
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    code = f"from setuptools.build_meta import build_{form} as build; print(build('dist'))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    return tree / "dist" / done.stdout.splitlines()[-1]


def test_the_source_distribution_holds_every_file_of_the_repository(tmp_path):
    archive = build("sdist", tmp_path)
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert tracked() - names == set()
    assert archive.name == f"stripe_observation-{stripe.__version__}.tar.gz"


IN_AN_EMPTY_FOLDER = """
train --depth 8 --block-name basicblock --module senet --dataset digits --epochs 1 --train-samples 80 --record 20 --workers 0 -c runs/se
collect --ckpt runs/se/checkpoints/last.pt --samples 20 --squeeze --workers 0 --out runs/probe
figures runs/probe --out figures/probe
validate --ckpt runs/se/checkpoints/last.pt --run runs/se --steps 2 --train-samples 60 --test-samples 20 --workers 0 --out runs/match
fold --ckpt runs/se/checkpoints/last.pt --train-samples 20 --val-samples 10 --test-samples 10 --samples 10 --batch 10 --workers 0 --counts 0 1 --order single --distill-steps 1 --backends --out runs/folded
report runs/probe --validation runs/match/validation.json --fold runs/folded/fold.json --out report.html
stats runs/probe
check runs/probe
"""  # noqa: E501


@pytest.mark.slow
def test_the_wheel_alone_runs_every_command_in_an_empty_folder(tmp_path):
    wheel = build("wheel", tmp_path / "tree")
    venv.create(tmp_path / "venv", with_pip=False)
    own = str(tmp_path / "venv/bin/python")
    assert pip("--python", own, "install", "--quiet", "--no-deps", "--no-index", str(wheel)).returncode == 0
    [packages] = tmp_path.glob("venv/lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # what an index would give
    shutil.rmtree(tmp_path / "tree")
    (tmp_path / "empty").mkdir()

    def run(*words):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        options = {"cwd": tmp_path / "empty", "env": environment, "capture_output": True, "text": True}
        return subprocess.run([own, *words], check=False, **options)

    assert run("-c", "import stripe; print(stripe.__file__)").stdout.startswith(str(packages))
    commands = [line.split() for line in IN_AN_EMPTY_FOLDER.strip().splitlines()]
    table = "".join(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `"))
    assert {words[0] for words in commands} == set(re.findall(r"`stripe (\w+)`", table))
    code = f"from stripe.cli import main\nfor words in {commands}: assert main(words) == 0, words"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "empty/report.html").stat().st_size > 50_000
    assert run("-m", "stripe", "stats", "no/such/run").returncode == 2


def test_versions_are_told_alike():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == stripe.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest == f"## {stripe.__version__}"


def test_the_workflow_runs_the_gate_with_the_oldest_python():
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    oldest, newest = job["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={oldest}"
    assert tuple(map(int, newest.split("."))) > tuple(map(int, oldest.split(".")))
