"""Encode tensors as a safetensors file without copying them.

The safetensors library would copy each tensor twice. It is what reads the files.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def encode_safetensors(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the bytes of a safetensors file in parts: length, JSON header, data.

    Args:
        tensors: contiguous CPU tensors by name. The returned parts are views on them.
    """
    header = {}
    data: list[bytes | memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        data.append(tensor.reshape(-1).view(torch.uint8).numpy().data)

    # The format wants the data aligned to 8 bytes: pad the header with spaces.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *data]
