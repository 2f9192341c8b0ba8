"""torch's settings for a run, and the names of what makes its bits."""

import os
import sys

import pytest
import torch

import distrain.distributed.numerics
from distrain.distributed.numerics import collect_environment, set_torch_numerics
from distrain.errors import UserError

CPU = torch.device("cpu")
GPU = torch.device("cuda", 3)
"""Asked for, and never there."""


def test_numerics_are_set_and_set_back():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with set_torch_numerics(CPU, precision="fp32", exact=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_num_threads() == 1
    assert before == (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    with set_torch_numerics(CPU, precision="fp32", exact=False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("loaded", [True, False])
def test_torchs_compiler_is_told_and_not_loaded_for_that(monkeypatch, loaded):
    told = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda mode, **_: told.append(mode)
    )
    monkeypatch.setattr(
        sys,
        "modules",
        {**sys.modules, **({"torch._inductor": torch} if loaded else {})},
    )
    if not loaded:
        sys.modules.pop("torch._inductor", None)
    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC", raising=False)
    with set_torch_numerics(CPU, precision="fp32", exact=True):
        assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1", (
            "for a model that loads it later"
        )
        assert told == [True] * loaded
        assert torch.are_deterministic_algorithms_enabled() == (not loaded)
    assert told == [True, False] * loaded


def test_a_precision_that_the_device_lacks_is_the_users_to_know():
    with (
        pytest.raises(UserError, match="tf32 exists on NVIDIA GPUs only"),
        set_torch_numerics(CPU, precision="tf32", exact=True),
    ):
        pass


def test_the_gpu_is_set_before_anything_is_computed_on_it(monkeypatch, cuda):
    monkeypatch.setattr(
        distrain.distributed.numerics, "_check_cublas_workspace", cuda.noting("product")
    )
    with set_torch_numerics(GPU, precision="fp32", exact=True):
        pass
    assert cuda.made == [("set_device", GPU), ("product", GPU)]


def test_a_workspace_that_is_set_too_late_is_the_users_to_know(monkeypatch, cuda):
    """torch's message, as its source has it where the variable was not set at the first product."""
    before = torch.are_deterministic_algorithms_enabled()
    text = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
        "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment "
        "variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or "
        "CUBLAS_WORKSPACE_CONFIG=:16:8."
    )

    def refuse(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(torch, "ones", cuda.noting("ones"))
    monkeypatch.setattr(torch, "mm", refuse)
    sentence = "set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before Python"
    with (
        pytest.raises(UserError, match=sentence),
        set_torch_numerics(GPU, precision="fp32", exact=True),
    ):
        pass
    assert torch.are_deterministic_algorithms_enabled() == before
    with set_torch_numerics(GPU, precision="fp32", exact=False):
        assert torch.backends.cudnn.benchmark, "fast mode needs no fixed workspace"


def test_environment_of_a_gpu_names_what_makes_its_bits(monkeypatch, tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
    )
    monkeypatch.setattr(
        distrain.distributed.numerics, "_DRIVER_VERSION_FILE", tmp_path / "version"
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device: f"card {device.index}"
    )
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    found = collect_environment(GPU)
    assert found["driver"] == "580.159.04"
    assert found["device"] == "card 3"
    assert found["cuda"] == str(torch.version.cuda)
    assert found["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "cudnn" in found
    assert any("nvimgcodec" in name for name in found), "DALI's decoders"
    assert not {"driver", "cuda", "cudnn"} & collect_environment(CPU).keys()
    monkeypatch.setattr(
        distrain.distributed.numerics, "_DRIVER_VERSION_FILE", tmp_path / "none"
    )
    assert collect_environment(GPU)["driver"] == "unknown"


def test_environment_names_versions():
    found = collect_environment(CPU)
    assert (
        found["torch"] == torch.__version__.split("+")[0]
        or found["torch"] == torch.__version__
    )
    assert {"python", "numpy", "device", "cpu_capability"} <= set(found)
