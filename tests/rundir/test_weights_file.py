"""Files of weights of any origin: what is read from them, and what is refused in a sentence."""

import hashlib
import io
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch
from small_server import SmallHandler, SmallServer, serve
from torch import nn

from distrain.errors import UserError
from distrain.rundir import weights_file
from distrain.rundir.weights_file import read_weights_file

STATE_DICT = {
    "features.0.weight": torch.arange(6.0).reshape(2, 3),
    "features.0.bias": torch.tensor([1.0, -1.0]),
    "norm.num_batches_tracked": torch.tensor(7),
}


def check_equal(found, expected=STATE_DICT):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous(), name
        assert not found[name].requires_grad, name


def refuse(path) -> str:
    with pytest.raises(UserError) as caught:
        read_weights_file(str(path))
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
        lambda state: {"state_dict": state, "arch": "alexnet"},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {
            "model_state_dict": {f"_orig_mod.{n}": t for n, t in state.items()}
        },
        lambda state: {
            n: nn.Parameter(t, requires_grad=t.is_floating_point())
            for n, t in state.items()
        },
    ],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_what_torch_save_wrote(tmp_path, wrap, is_zip):
    path = tmp_path / "model.pth"
    torch.save(wrap(STATE_DICT), path, _use_new_zipfile_serialization=is_zip)
    found = read_weights_file(str(path))
    check_equal(found.tensors)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.metadata, found.url, found.notes) == ({}, str(path), ())


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_safetensors_with_their_metadata(tmp_path, name):
    path = tmp_path / name
    tensors = {f"module.{name}": tensor for name, tensor in STATE_DICT.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    found = read_weights_file(str(path))
    check_equal(found.tensors, {name: STATE_DICT[name] for name in found.tensors})
    assert found.tensors.keys() == STATE_DICT.keys()
    assert found.metadata == {"format": "pt"}


def test_half_precision_becomes_float32_and_a_note_says_so(tmp_path):
    path = tmp_path / "half.pt"
    values = torch.tensor([1.5, -2.0])
    state = {
        "a": values.bfloat16(),
        "b": values.half(),
        "c": values.double(),
        "d": values,
    }
    torch.save(state, path)
    found = read_weights_file(str(path))
    check_equal(found.tensors, dict.fromkeys("abcd", values))
    assert found.notes == (
        f"{path} has weights in bfloat16 and float16 and float64, which become float32",
    )


def test_a_view_becomes_contiguous(tmp_path):
    path = tmp_path / "view.pt"
    torch.save({"a": torch.arange(6.0).reshape(2, 3).T}, path)
    check_equal(
        read_weights_file(str(path)).tensors,
        {"a": torch.tensor([[0.0, 3], [1, 4], [2, 5]])},
    )


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_code_is_never_run(tmp_path, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    torch.save(
        {"a": torch.ones(2), "b": Evil()}, path, _use_new_zipfile_serialization=is_zip
    )
    assert refuse(path) == (
        f"{path} holds more than weights, posix.mkdir, which would run code when it is "
        "read: save the state_dict() of the model alone, by torch.save or as safetensors"
    )
    path.write_bytes(pickle.dumps(Evil()))
    refuse(path)
    assert not (tmp_path / "ran").exists()


def test_a_whole_model_is_code_too(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    assert "holds more than weights, torch.nn.modules.linear.Linear" in refuse(path)


def make_zip(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.pth", b"", "EOFError"),
        ("a.pth", b"<html>404</html>", "UnpicklingError"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\n", ""),
        ("a.pth", b"PK\x03\x04 cut off", "zip: File is not a zip file"),
        ("a.pth", make_zip(photo=b"jpeg"), "RuntimeError"),
        (
            "a.pth",
            make_zip(**{"m__constants.pkl": b"", "m__data.pkl": b""}),
            "a program in TorchScript",
        ),
        ("a.safetensors", b"", "safetensors: "),
        ("a.safetensors", b"\xff" * 100, "safetensors: "),
        ("a", (2).to_bytes(8, "little") + b"{", "safetensors: "),
    ],
)
def test_what_is_not_a_file_of_weights(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    text = refuse(path)
    assert text.startswith(f"{path} is not a file of weights ({reason}")
    assert text.endswith(
        "): use a .safetensors file, or save a state_dict() by torch.save"
    )


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off(tmp_path, is_zip, share):
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "is not a file of weights" in refuse(path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({}, "dict"),
        (torch.ones(2), "Tensor"),
        ([torch.ones(2)], "list"),
        ({"epoch": 3, "net": {"a": torch.ones(2)}}, "epoch, net"),
        ({"model": {}}, "dict"),
    ],
)
def test_no_tensors(tmp_path, value, found):
    path = tmp_path / "model.pt"
    torch.save(value, path)
    assert refuse(path) == (
        f"{path} holds no tensors by name, but {found}: save the state_dict() of the model"
    )


def test_something_else_among_the_weights(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2), "extra": {"scale": 2}}, path)
    assert "holds extra, which is not a tensor, among its weights: save" in refuse(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, dtype=torch.complex64),
        torch.empty(2, device="meta"),
    ],
)
def test_tensors_of_other_kinds(tmp_path, tensor):
    path = tmp_path / "model.pt"
    torch.save({"a": tensor}, path)
    assert ": a is a tensor of type torch." in refuse(path)


def test_what_is_too_large(tmp_path, monkeypatch):
    """Before it is read, unpacked or copied: the file, the archive's content, the tensors."""
    monkeypatch.setattr(weights_file, "MAX_WEIGHTS_BYTES", 10_000)
    # The size of the file: a hole of a terabyte.
    path = tmp_path / "large.pth"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert refuse(path) == (
        f"{path} has 1,099,511,627,776 bytes of weights, more than the 10,000 that are "
        "read: use a smaller network"
    )
    # Zeros that an archive compresses.
    path.write_bytes(make_zip(zeros=bytes(1 << 20)))
    assert path.stat().st_size < 10_000
    assert "has 1,048,576 bytes of weights, more than" in refuse(path)
    # A number that a tensor repeats.
    torch.save({"a": torch.ones(1).expand(10**15)}, path)
    assert "has 4,000,000,000,000,000 bytes of weights, more than" in refuse(path)


def test_no_file(tmp_path):
    path = tmp_path / "none.pth"
    assert refuse(path) == f"no file at {path}: check the path"
    assert "is a folder: name the file of the weights in it" in refuse(tmp_path)
    (tmp_path / "file").touch()
    assert "no file at" in refuse(tmp_path / "file" / "model.pth")


class _Weights(SmallHandler):
    body = b""

    def do_GET(self) -> None:  # noqa: N802
        known = self.path.startswith("/folder/model.pth?token=")
        self.answer(200 if known else 404, self.body if known else b"")

    do_HEAD = do_GET  # noqa: N815


def test_a_file_on_a_web_server(monkeypatch):
    file = io.BytesIO()
    torch.save(STATE_DICT, file)
    monkeypatch.setattr(_Weights, "body", file.getvalue())
    with serve(SmallServer(_Weights)) as server:
        found = read_weights_file(f"{server.url}/folder/model.pth?token=secret")
        assert found.url == f"{server.url}/folder/model.pth"
        check_equal(found.tensors)
        with pytest.raises(UserError, match="no file at .*/none.pth: check the path"):
            read_weights_file(f"{server.url}/none.pth")
