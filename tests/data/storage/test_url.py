"""URLs: their parts, their home directory, and what messages show of them."""

from pathlib import Path

import pytest

from distrain.config import load_config, override_config
from distrain.data.prepare.commands import pack
from distrain.data.storage.store import Store
from distrain.data.storage.url import expand_home, join_url, redact_url
from distrain.errors import UserError
from distrain.launch.jobs import submit


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A home directory, and another folder as the working directory."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_what_is_expanded(home):
    assert expand_home("~") == str(home)
    assert expand_home("~/a/~/b") == f"{home}/a/~/b"
    assert expand_home("file://~/a") == f"file://{home}/a"
    assert expand_home("~root/a") == f"{Path('~root').expanduser()}/a"
    for path in ("./~/a", "a~", "/a/~", "s3://~/a", "~nobody.of.this.name/a", ""):
        assert expand_home(path) == path
    assert expand_home(None) is None


def test_a_home_that_is_not_known_is_a_sentence(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    message = "~/a is in your home directory, which is not known: set HOME, or write"
    with pytest.raises(UserError, match=message):
        expand_home("~/a")
    with pytest.raises(UserError, match=message):
        load_config("quickstart", ["data.cache=~/a"])


def test_every_path_of_a_config(home, tmp_path):
    paths = ["data.train=~/t", "data.val=~/v", "data.cache=~/c", "run=~/r"]
    config = load_config("quickstart", paths)
    assert config.data.train == f"{home}/t"
    assert config.data.val == f"{home}/v"
    assert config.data.cache == f"{home}/c"
    assert config.run == f"{home}/r"
    assert override_config(config, ["run=~/x"]).run == f"{home}/x"
    # In a recipe, which itself is in the home directory.
    (home / "my.yaml").write_text(
        "data: {train: ~/t}\nrun: ~/r\nschedule: {name: constant, lr: 0.1}\n"
    )
    config = load_config("~/my.yaml")
    assert (config.data.train, config.run) == (f"{home}/t", f"{home}/r")
    # A folder that is named so.
    assert load_config("quickstart", ["run=./~/r"]).run == "./~/r"


def test_a_job_gets_the_path_of_this_machine(home):
    template = home / "site.sbatch"
    template.write_text(
        "#!/bin/bash\n#SBATCH -c 4\n# distrain: begin\n# distrain: end\n"
    )
    (home / "net.py").write_text("")
    config = load_config("quickstart", ["data.train=~/t", "data.val=~/v", "run=~/r"])
    script = submit(
        config, to="slurm", template="~/site.sbatch", files=["~/net.py"], dry_run=True
    ).text
    assert f"run: {home}/r\n" in script
    assert f"export PYTHONPATH={home}\n" in script
    assert "~" not in script


def test_paths_of_data_commands(home, digits):
    assert Store("~/a").local_path == f"{home}/a"
    assert Store("./~/a").local_path == f"{home.parent}/work/~/a"
    assert Store("~/a").url == f"{home}/a"
    with pytest.raises(UserError, match=f"{home}/none"):
        pack("~/none", "~/out")
    assert not Path("~").exists()


def test_the_url_of_what_lies_in_a_folder():
    assert join_url("photos", "cat") == "photos/cat"
    assert join_url("/", "cat") == "/cat"
    assert join_url("s3://bucket/photos", "a/b") == "s3://bucket/photos/a/b"
    assert join_url("zip://::x.zip", "cat") == "zip://cat::x.zip"
    assert join_url("zip://a::/tmp/x.zip", "cat") == "zip://a/cat::/tmp/x.zip"


def test_a_url_without_a_secret_stays_as_it_is():
    for url in ("zip://::x.zip", "s3://b/x", "https://h:1/x", "a?b@c", "memory://x"):
        assert redact_url(url) == url
    url = "zip://a::https://user:secret@host/x.zip?sig=1"
    assert redact_url(url) == "zip://a::https://host/x.zip"
