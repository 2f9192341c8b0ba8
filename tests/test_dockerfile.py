"""What can be said of the image without building it; `tests/docker.py` builds it."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import docker
import pytest
import yaml

import distrain

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it along
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
STEPS = list(docker.parse_steps(TEXT))
STAGES = docker.parse(TEXT)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {
    re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line.split("==")[1]
    for line in (ROOT / "cluster/constraints.txt").read_text().splitlines()
    if not line.startswith("#")
}
(EXTRAS,) = re.findall(r"'\.\[([a-z0-9,]+)\]'", TEXT)


def variables() -> dict[str, str]:
    """ENV of the last stage alone."""
    return {
        k: v
        for step in STAGES[-1].steps
        if step.keyword == "ENV"
        for k, v in docker.assignments(step.text).items()
    }


def only(keyword: str) -> docker.Step:
    (step,) = [step for step in STAGES[-1].steps if step.keyword == keyword]
    return step


def test_hadolint():
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run(
        [linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_parser():
    text = "# c\nARG A=x\nFROM ${A}y:1 AS first\nRUN a \\\n  # between\n  && b\nFROM first\nCOPY --from=first /a /b\n"
    first, last = docker.parse(text)
    assert (first.name, first.base, last.base) == ("first", "xy:1", "first")
    assert first.steps[0].text.split() == ["a", "&&", "b"]
    assert last.steps[0] == docker.Step("COPY", {"from": "first"}, "/a /b")
    assert docker.Step("CMD", {}, '["a b"]').words == ["a b"]
    with pytest.raises(ValueError, match="RUN before"):
        docker.parse("RUN x")


def test_stages_and_their_base():
    assert [stage.name for stage in STAGES[:-1]] == ["base", "build"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", STAGES[0].base)
    assert {stage.base for stage in STAGES[1:]} == {"base"}
    assert "RUN" not in [step.keyword for step in STAGES[-1].steps]


def test_what_is_copied_is_there():
    files = docker.context(ROOT)
    sources = [
        s
        for stage in STAGES
        for step in stage.steps
        if step.keyword == "COPY"
        for s in step.words[:-1]
    ]
    ours = [source for source in sources if not source.startswith("/")]
    assert {"distrain", "configs", "cluster/constraints.txt"} <= set(ours)
    for source in ours:
        assert any(name == source or name.startswith(f"{source}/") for name in files), (
            source
        )
    used = [
        name
        for name in files
        if any(name == source or name.startswith(f"{source}/") for source in ours)
    ]
    assert used == files, "the context has more than the image is made of"


def test_context_follows_dockerignore(tmp_path):
    for name in ("a/x.py", "a/__pycache__/x.pyc", "a/b/no.yaml", "c.txt", "ab/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text("# c\n*\n!a\n**/__pycache__\na/b/*.yaml\n")
    assert docker.context(tmp_path) == ["a/x.py"]


def test_recipes_are_in_the_context_of_the_wheel():
    """The link in the package, and in the same stage what it points to."""
    build = next(stage for stage in STAGES if stage.name == "build")
    copied = [step.words for step in build.steps if step.keyword == "COPY"]
    assert ["configs", "configs"] in copied
    assert "distrain/recipes" in docker.context(ROOT)
    assert (ROOT / "distrain/recipes").readlink() == Path("../configs")


def test_nobody_is_root():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", only("USER").text)
    assert (only("ENTRYPOINT").words, only("CMD").words) == (["distrain"], ["--help"])


def test_the_label_has_the_version():
    labels = docker.assignments(only("LABEL").text)
    assert (
        labels["org.opencontainers.image.version"]
        == distrain.__version__
        == PROJECT["version"]
    )
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]
    assert labels["org.opencontainers.image.description"] == PROJECT["description"]
    assert labels["org.opencontainers.image.base.name"] == STAGES[0].base


def test_rays_settings():
    lines = (ROOT / "cluster/ray.env").read_text().splitlines()
    settings = docker.assignments(
        "\n".join(line for line in lines if not line.startswith("#"))
    )
    assert settings
    assert settings.items() <= variables().items()


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "cluster/kuberay").glob("ray*.yaml")),
    ids=lambda path: path.name,
)
def test_kuberay_has_rays_version_of_the_image(path):
    (cluster,) = [
        d for d in yaml.safe_load_all(path.read_text()) if d["kind"].startswith("Ray")
    ]
    assert (
        cluster["spec"].get("rayClusterSpec", cluster["spec"])["rayVersion"]
        == PINNED["ray"]
    )


def test_every_package_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    asked = PROJECT["dependencies"] + [
        asked
        for extra in EXTRAS.split(",")
        for asked in PROJECT["optional-dependencies"][extra]
    ]
    for line in asked:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(PINNED[name]), line
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in PINNED.values())


def test_header_of_the_constraints_names_the_extras():
    assert f"'.[{EXTRAS}]'" in (ROOT / "cluster/constraints.txt").read_text()
