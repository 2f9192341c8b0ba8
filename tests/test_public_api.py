"""`import distrain`: what it offers, what it loads, and that it does what the commands do."""

import importlib
import inspect
import io
import socket
import subprocess
import sys
import typing
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import typer
from photos import encoded, picture

import distrain as package
from distrain.cli.main import app
from distrain.config import to_yaml
from distrain.monitor.sinks import PlainConsole

HEAVY = ("torch", "torchvision", "ray", "nvidia", "pyarrow", "numpy", "fsspec")
# What a command prints or how it asks; from Python, results and callbacks say it.
ONLY_TYPED = {
    "overrides": "load_config takes them, or the function does",
    "follow": "logs(job, follow=True)",
    "max_rejects": "the result lists what was rejected",
    "every": "call top again",
    "dry_run": "dry_run(config), submit(dry_run=True)",
    "as_json": "Evaluation.to_dict, and the fields of a Prediction",
    "as_csv": "the fields of a Prediction",
}
# Of commands whose function has another name.
FUNCTIONS = {
    "eval": [package.evaluate],
    "predict": [package.Predictor, package.Predictor.predict],
}


def load(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after some code."""
    report = f"{code}\nimport sys\nprint('loaded', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_loads_nothing_heavy():
    assert load("import distrain") == set()
    assert load("import distrain; dir(distrain); distrain.__version__") == set()


def test_reading_a_config_loads_no_torch():
    recipe = Path(__file__).parents[1] / "configs/quickstart.yaml"
    loaded = load(f"import distrain; distrain.load_config({str(recipe)!r})")
    assert loaded <= {"numpy", "fsspec"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["pack", "--help"]],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(arguments):
    code = (
        f"import sys; sys.argv = ['distrain', *{arguments}]\n"
        "from distrain.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert load(code) == set()


def test_every_public_name_is_there_and_documented():
    assert package.__all__ == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__name__ == name
        assert inspect.getdoc(value), name
        assert name in package.__doc__


def test_names_for_type_checkers_are_those_at_run_time():
    source = inspect.getsource(package)
    block = source.partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0]
    typed: dict[str, object] = {}
    exec(inspect.cleandoc(block), typed)
    assert typed.keys() - {"__builtins__"} == set(package.__all__)
    for name in package.__all__:
        assert typed[name] is getattr(package, name)


def test_no_module_has_the_name_of_a_function():
    """Importing it would replace the function by the module."""
    for name in package.__all__:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"distrain.{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty: it must hold a recipe"), (None, "is a folder, not a recipe")],
)
def test_what_is_no_recipe_is_a_sentence(tmp_path, text, message):
    place = tmp_path / "mine.yaml"
    if text is None:
        place.mkdir()
    else:
        place.write_text(text)
    with pytest.raises(package.UserError, match=message):
        package.load_config(place)


def test_a_page_that_does_not_answer_is_a_sentence():
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(package.UserError, match="no metrics page answers at"):
            package.top(url)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        package.trian  # noqa: B018


def commands() -> dict[str, dict[str, str]]:
    """Of each command, its parameters and the options that they are typed as."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    found = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        leaves = (
            {f"{name}_{k}": c for k, c in inner.items()} if inner else {name: command}
        )
        for leaf, one in leaves.items():
            found[leaf] = {
                parameter.name: parameter.opts[0].lstrip("-").replace("-", "_")
                for parameter in one.params
            }
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_is_a_function_with_the_same_words(command):
    taken = {
        name
        for function in FUNCTIONS.get(command, [getattr(package, command, None)])
        for name in inspect.signature(function).parameters
    }
    for parameter, option in commands()[command].items():
        if parameter in ONLY_TYPED:
            continue
        # `with` cannot be the name of an argument. A command reads a recipe, a function
        # takes the config that `load_config` made of it.
        name = {"with": "files", "recipe": "config"}.get(option, option)
        assert name in taken, f"{command} --{option}"


@pytest.mark.parametrize("name", sorted({*package.__all__}))
def test_signatures_are_documented(name):
    """Each argument has a line below Args."""
    function = getattr(package, name)
    if isinstance(function, type):
        return
    documented = inspect.getdoc(function).partition("Args:")[2]
    typing.get_type_hints(function)
    for argument in inspect.signature(function).parameters:
        if function.__module__ == "distrain.config":
            continue
        assert f"\n    {argument}: " in documented, f"{name}({argument})"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two classes with six images each, and one file that is none."""
    for label in ("cat", "dog"):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for i in range(6):
            (folder / f"{i}.jpg").write_bytes(encoded(picture(i, 80, 60)))
    (tmp_path / "photos/dog/junk.jpg").write_bytes(b"junk")
    return tmp_path / "photos"


def test_a_data_set_from_python(photos, tmp_path):
    """Pack, look at it, verify it; samples by number."""
    target = str(tmp_path / "shards")
    progress = []
    packed = package.pack(
        str(photos),
        target,
        geometry="square:48",
        processes=1,
        on_progress=lambda p: progress.append((p.done, p.total)),
    )
    assert (packed.manifest.num_rows, packed.manifest.classes) == (12, ("cat", "dog"))
    assert [reject.name for reject in packed.rejects] == ["dog/junk.jpg"]
    assert progress[0] == (0, 13)
    assert progress[-1] == (13, 13)
    verified = package.verify(target)
    assert (verified.problems, verified.num_images) == ([], 12)
    summary = package.inspect(target, sheet=tmp_path / "sheet.png")
    assert summary.rows_per_class == {"cat": 6, "dog": 6}
    assert summary.heights == (48, 48, 48)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    found = package.stats(target).statistics
    assert found.mean.tolist() == packed.manifest.statistics.mean.tolist()
    with pytest.raises(package.UserError, match="leave out labels, image_column"):
        package.stats(target, labels="labels.txt")
    with pytest.raises(package.UserError, match="no folder .*nowhere"):
        package.inspect(target, sheet=tmp_path / "nowhere/sheet.png")
    dataset = package.Dataset.open(target)
    assert dataset.classes == ("cat", "dog")
    rows = list(dataset)
    assert len(rows) == len(dataset) == 12
    assert sorted(row.label for row in rows) == [0] * 6 + [1] * 6
    with pytest.raises(IndexError):
        dataset[12]
    with pytest.raises(TypeError, match="'slice' object cannot be interpreted"):
        dataset[0:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "png"}, "encoding 'png' is not valid: use jpeg or raw"),
        ({"quality": 101}, "quality 101 is not valid: use 1 to 100"),
        ({"geometry": "round"}, "geometry round is not valid"),
        ({"geometry": 224}, "geometry 224 is not valid: use keep, short:N or square:N"),
        ({"processes": -1}, "processes -1 is not valid: use at least 1"),
        ({"geometry": "square:100000"}, "square:100000 is over the limit of 50,000,00"),
        ({"processes": 0}, "processes 0 is not valid: use at least 1"),
        ({"pixel_limit": 0}, "pixel_limit 0 is not valid: use at least 1"),
    ],
)
def test_wrong_options_of_pack_are_a_sentence(photos, tmp_path, options, message):
    with pytest.raises(package.UserError, match=message):
        package.pack(str(photos), str(tmp_path / "shards"), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("index", {"processes": 0}, "processes 0 is not valid: use at least 1"),
        ("index", {"pixel_limit": 0}, "pixel_limit 0 is not valid: use at least 1"),
        ("stats", {"processes": 0}, "processes 0 is not valid: use at least 1"),
    ],
)
def test_wrong_options_of_index_and_stats_are_a_sentence(
    photos, name, options, message
):
    with pytest.raises(package.UserError, match=message):
        getattr(package, name)(photos, **options)


def test_paths_as_path(photos, tmp_path):
    """As strings are, wherever a path or URL is expected."""
    names = tmp_path / "names.txt"
    names.write_text("Cat\nDog\n")
    target = tmp_path / "shards"
    packed = package.pack(photos, target, names=names, processes=1)
    assert packed.manifest.classes == ("Cat", "Dog")
    assert package.verify(target).problems == []
    assert package.inspect(target).rows_per_class == {"Cat": 6, "Dog": 6}
    assert len(package.Dataset.open(target)) == 12
    assert len(package.stats(photos, processes=1).rejects) == 1
    assert package.stats(target).rejects == []
    with pytest.raises(package.UserError, match="is a folder of image files"):
        package.index(photos, to=tmp_path / "index")


def test_a_script_packs_with_several_processes(photos, tmp_path):
    """Below the guard that multiprocessing asks for, as the docstring says."""
    script = tmp_path / "script.py"
    script.write_text(
        "import distrain\n"
        "if __name__ == '__main__':\n"
        f"    packed = distrain.pack({str(photos)!r}, 'shards', processes=2)\n"
        "    print(packed.manifest.num_rows)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "12\n", "")


def test_a_script_without_the_guard_is_told(photos, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import distrain\ndistrain.pack({str(photos)!r}, 'shards', processes=2)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert 'call them below `if __name__ == "__main__":`' in last
    assert done.stderr.count("__main__") == 1
    assert "bootstrapping" not in done.stderr, "multiprocessing's own traceback"


@pytest.mark.parametrize("name", ["train", "dry_run", "lr", "submit"])
def test_a_recipe_name_is_no_config(name):
    with pytest.raises(
        package.UserError, match="takes a Config, not 'quickstart': load"
    ):
        getattr(package, name)("quickstart")


def test_a_run_from_python(narrow, tmp_path, digits):
    """What dry_run foretells, train does; a second call has nothing left to do."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(to_yaml(narrow(data={"val": str(digits / "val")})))
    config = package.load_config(recipe, ["epochs=2", f"run={tmp_path / 'run'}"])
    steps = package.dry_run(config)["steps"]
    curve = package.lr(config, points=5)
    with pytest.raises(package.UserError, match="cannot plot into"):
        package.lr(config, png=tmp_path / "nowhere/lr.png")
    out = io.StringIO()
    summary = package.train(config, console=PlainConsole(out))
    assert summary.status == "finished"
    assert steps.startswith(f"{summary.steps:,} = 2 x ")
    assert [curve[0].step, curve[-1].step] == [0, summary.steps - 1]
    assert "validation loss" in out.getvalue()
    assert f"weights   {summary.weights[:16]}" in out.getvalue()
    changed = package.override_config(config, ["epochs=3"])
    assert (config.epochs, changed.epochs) == (2, 3)
    again = package.train(config, console=PlainConsole(io.StringIO()), resume=True)
    assert (again.status, again.weights) == ("already finished", summary.weights)
    lines = package.top(str(tmp_path / "run"))
    assert lines[1] == f"finished: {summary.steps} steps"
    (log,) = (tmp_path / "run").glob("log-*.txt")
    assert "validation loss" in log.read_text(), "as the command keeps it"
    text = package.submit(config, dry_run=True).text
    assert "distrain/trainer.py" in text
    other = package.load_config(recipe, [f"run={tmp_path / 'other'}"])
    with pytest.raises(package.UserError, match="no checkpoint to resume from"):
        package.train(other, console=PlainConsole(io.StringIO()), resume=True)


def test_workers_are_checked_as_in_a_recipe(tmp_path):
    config = package.load_config(
        Path(__file__).parents[1] / "configs/quickstart.yaml", [f"run={tmp_path}"]
    )
    with pytest.raises(package.UserError, match="maximum: use workers=2-3"):
        package.train(config, workers="3-2")
    with pytest.raises(package.UserError, match="cannot submit to 'nomad'"):
        package.submit(config, to="nomad")


def test_resume_imports_the_files_that_it_sends(tmp_path, monkeypatch):
    """The run directory's config names a class that only they have."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "kept_losses.py").write_text(
        "from distrain import Loss\n\n\nclass Mine(Loss):\n"
        "    def __call__(self, logits, labels):\n        return logits[:, 0]\n"
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        "data: {train: /data/train}\nschedule: {name: constant, lr: 0.1}\n"
        "loss: {name: 'kept_losses:Mine'}\n"
    )
    submission = package.resume(
        str(run), files=[tmp_path / "kept_losses.py"], dry_run=True
    )
    assert submission.status == "dry_run"
    assert "kept_losses.py" in submission.text
    assert " --resume" in submission.text


def test_what_a_platform_does_not_take_is_refused(tmp_path):
    config = package.load_config("quickstart", [f"run={tmp_path}"])
    with pytest.raises(package.UserError, match="a job on ray has no namespace"):
        package.submit(config, namespace="mine", dry_run=True)
    with pytest.raises(package.UserError, match="a Ray cluster has no template"):
        package.submit(config, template="rayjob.yaml", dry_run=True)
    for to in ("kuberay", "slurm"):
        remedy = f"a job on {to} does not go through a Ray dashboard: leave"
        with pytest.raises(package.UserError, match=remedy):
            package.submit(config, to=to, address="http://head:8265", dry_run=True)


def test_one_file_in_place_of_a_list(tmp_path):
    config = package.load_config("quickstart", [f"run={tmp_path}"])
    remedy = r"files must be a list of paths, not one path: use \['loss.py'\]"
    for call in (partial(package.submit, config), partial(package.resume, tmp_path)):
        for file in ("loss.py", Path("loss.py")):
            with pytest.raises(package.UserError, match=remedy):
                call(files=file)


def test_resume_with_one_text_of_overrides(tmp_path):
    with pytest.raises(package.UserError, match="overrides 'epochs=1' must be a list"):
        package.resume(tmp_path, "epochs=1")


def test_resume_refuses_what_would_change_the_weights(tmp_path):
    """When it is typed, and not only once the job has started."""
    (tmp_path / "config.yaml").write_text(
        "data: {train: /data/train}\nschedule: {name: constant, lr: 0.1}\n"
    )
    submission = package.resume(tmp_path, ["checkpoint.keep=5"], dry_run=True)
    assert submission.status == "dry_run"
    with pytest.raises(package.UserError, match="epochs: 90 before, 40 now") as caught:
        package.resume(tmp_path, ["epochs=40", "checkpoint.keep=5"], dry_run=True)
    assert "keep" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(package.override_config, [["epochs=1"]]), (package.to_yaml, [])],
)
def test_a_name_is_not_taken_for_a_config(function, arguments):
    remedy = f"{function.__name__} takes a Config, not 'quickstart': load a recipe"
    with pytest.raises(package.UserError, match=remedy):
        function("quickstart", *arguments)


def test_a_function_is_no_console(tmp_path):
    config = package.load_config("quickstart", [f"run={tmp_path}"])
    with pytest.raises(package.UserError, match="is not a distrain.Console"):
        package.train(config, console=print)
    assert list(tmp_path.iterdir()) == []


def test_the_layers_of_a_model():
    summary = package.model("alexnet", ["augment.crop=128"], classes=10)
    assert summary.side == 128
    assert summary.layers[0].output_shape[0] == 64
    with pytest.raises(package.UserError, match="classes 0 is not valid"):
        package.model("alexnet", classes=0)


@pytest.mark.parametrize("points", [-1, 0, 1])
def test_a_curve_has_two_points(points):
    config = package.load_config(
        Path(__file__).parents[1] / "configs/alexnet-lars-8k.yaml"
    )
    with pytest.raises(package.UserError, match=f"points {points} is not valid"):
        package.lr(config, images=1281167, points=points)
