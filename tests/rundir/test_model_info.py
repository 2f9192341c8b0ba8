"""What `model.json` says is read back to the bit, and what cannot be read is a sentence."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.rundir.model_info import ModelInfo, read_model_info

INFO = ModelInfo(
    distrain="0.1.0",
    model={"name": "alexnet", "width": 0.04, "dropout": 0.5},
    classes=("golden eagle", "golden retriever", "Köter"),
    channels="RGB",
    mean=(123.5, 116.0, 103.25),
    std=(58.0, 57.0, 57.5),
    crop=224,
    short_side=256,
    image_size=None,
    interpolation="bilinear",
    antialias=True,
)

CHANNELS = st.lists(
    st.floats(0, 255, width=32, allow_subnormal=False), min_size=3, max_size=3
)


@given(CHANNELS, CHANNELS)
@settings(max_examples=50)
def test_values_come_back_to_the_bit(mean, std):
    info = replace(INFO, mean=tuple(mean), std=tuple(std), image_size=(72, 80))
    found = ModelInfo.from_json(info.to_json())
    assert found == info
    assert np.float32(found.mean).tobytes() == np.float32(mean).tobytes()


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError) as missing:
        read_model_info(Store(str(tmp_path)))
    assert str(missing.value) == (
        f"there is no {tmp_path}/model.json: repeat the command that trained the run, "
        "which writes it from the config and the data"
    )
    with pytest.raises(UserError, match="there is no .*step-00000001-attempt-001/mo"):
        read_model_info(Store(str(tmp_path)), "step-00000001-attempt-001")


LATER = json.dumps({**json.loads(INFO.to_json()), "format": 2})
SHORT = json.dumps({"format": 1, **json.loads(INFO.to_json()), "crop": 1}).replace(
    '"crop"', '"kept"'
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting property name"),
        ("[]", "it has no format"),
        ("{}", "it has no format"),
        (LATER, "it has format 2, and this version of distrain reads format 1"),
        (SHORT, "it lacks crop"),
    ],
)
def test_what_cannot_be_read(tmp_path, text, problem):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=rf"model.json cannot be used \({problem}"):
        read_model_info(Store(str(tmp_path)))
