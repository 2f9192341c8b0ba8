"""`distrain export` as it is typed."""

import json

import pytest


def test_export_prints_what_it_did(distrain, trained, tmp_path):
    run = str(trained.run)
    code, out, err = distrain("export", run, "--to", str(tmp_path / "it"))
    assert code == 0
    assert "evaluate: 359 of 359 images" in err
    assert "compare: 359 of 359 images" in err
    record = trained.records[-1]
    assert f"top-1     {record.top1:.2%}  (95% interval " in out
    assert "proof     the same class as distrain on 359 of 359 images" in out
    assert f"wrote     {tmp_path}/it/model.safetensors (0." in out
    shown = [
        line for line in out.splitlines() if str(tmp_path.parent.parent) not in line
    ]
    assert max(map(len, shown)) <= 80
    _, wanted, _ = distrain("eval", run, "--json")
    _, found, _ = distrain("eval", str(tmp_path / "it"), "--json")
    assert json.loads(found)["top1"] == json.loads(wanted)["top1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there are 0 models to export: name one run directory"),
        (["RUN", "RUN"], "there are 2 models to export: name one run directory"),
        (["RUN", "--format", "torchvision"], "has no form in torchvision"),
        (["RUN", "--data", "/nothing"], "no data set at /nothing"),
    ],
)
def test_mistakes_of_export(distrain, trained, tmp_path, arguments, message):
    arguments = [str(trained.run) if a == "RUN" else a for a in arguments]
    folder = ["lanes=1", "--to", str(tmp_path / "it")]
    code, _, err = distrain("export", *arguments, *folder)
    assert code == 2
    assert message in err.splitlines()[-1]
