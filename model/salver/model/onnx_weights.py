"""The weights of an ONNX file that was exported from a transformers model, under the model's own names.

The graph is not run: only what it multiplies is read. An exporter keeps the names of biases, norms and
embeddings. It transposes a linear map's matrix and gives it a number, but the product's node has the
module's path in its name: `/bert/encoder/layer.0/intermediate/dense/MatMul`. Matrices may be quantized:
4 bits in blocks (MatMulNBits) or 8 bits with one scale or one for each column. The messages are those
of onnx.proto, of which so few fields are needed that the `onnx` package would be a dependency for little.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from torch import Tensor

from .errors import CheckpointError

Array = NDArray[Any]

_OPTIONAL, _REPEATED = 1, 3
_FLOAT, _INT64, _INT32, _STRING, _BYTES = 2, 3, 5, 9, 12
# (name, number, type or message, label) of the fields that are read.
_MESSAGES: dict[str, tuple[tuple[str, int, int | str, int], ...]] = {
    "TensorProto": (
        ("dims", 1, _INT64, _REPEATED), ("data_type", 2, _INT32, _OPTIONAL),
        ("float_data", 4, _FLOAT, _REPEATED), ("int32_data", 5, _INT32, _REPEATED),
        ("name", 8, _STRING, _OPTIONAL), ("raw_data", 9, _BYTES, _OPTIONAL),
        ("data_location", 14, _INT32, _OPTIONAL),
    ),
    "AttributeProto": (("name", 1, _STRING, _OPTIONAL), ("i", 3, _INT64, _OPTIONAL)),
    "NodeProto": (
        ("input", 1, _STRING, _REPEATED), ("name", 3, _STRING, _OPTIONAL), ("op_type", 4, _STRING, _OPTIONAL),
        ("attribute", 5, "AttributeProto", _REPEATED),
    ),
    "GraphProto": (("node", 1, "NodeProto", _REPEATED), ("initializer", 5, "TensorProto", _REPEATED)),
    "ModelProto": (("graph", 7, "GraphProto", _OPTIONAL),),
}  # fmt: skip
_TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}  # TensorProto.DataType
_PARAMETER = re.compile(r"[\w.]+\.(weight|bias)")
_PRODUCTS = {"MatMul", "MatMulNBits", "MatMulInteger"}
_PRODUCT_NAME = re.compile(r"/MatMul[^/]*$")


def model_class() -> Callable[[], Any]:
    """The message ModelProto."""
    file = descriptor_pb2.FileDescriptorProto(
        name="salver_onnx.proto", package="salver.onnx", syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label in fields:
            if isinstance(kind, str):
                message.field.add(
                    name=field, number=number, type=11, type_name=f".salver.onnx.{kind}", label=label
                )
            else:
                message.field.add(name=field, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found: Callable[[], Any] = message_factory.GetMessageClass(
        pool.FindMessageTypeByName("salver.onnx.ModelProto")
    )
    return found


class OnnxFile:
    """A `WeightFile`. Raises CheckpointError, naming the file, for what it does not understand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = model_class()()
        try:
            model.ParseFromString(path.read_bytes())
        except (OSError, DecodeError) as error:
            raise CheckpointError(f"{path}: not an ONNX file that can be read: {error}") from error
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sources: dict[str, Callable[[], Array]] = {}
        for name in self._initializers:
            plain = name.removesuffix("_quantized")
            if _PARAMETER.fullmatch(plain):
                self._sources[plain] = lambda name=name: self._values(name)  # type: ignore[misc]
        for node in model.graph.node:
            if node.op_type in _PRODUCTS and len(node.input) > 1 and node.input[1] in self._initializers:
                self._add_product(node)
        if not self._sources:
            raise CheckpointError(f"{path}: no tensor in it has the name of a weight")
        self.names = tuple(self._sources)

    def read(self, name: str) -> Tensor:
        """float32."""
        return torch.from_numpy(np.array(self._sources[name](), dtype=np.float32, order="C"))

    def _add_product(self, node: Any) -> None:
        path, found = _PRODUCT_NAME.subn("", node.name)
        name = path.strip("/").replace("/", ".") + ".weight"
        if not found or not _PARAMETER.fullmatch(name):
            raise CheckpointError(f"{self.path}: the name of the node {node.name!r} names no weight")
        if node.op_type == "MatMulNBits":
            self._sources[name] = lambda: self._of_blocks(node)
        else:
            self._sources[name] = lambda: self._values(node.input[1]).T

    def _values(self, name: str) -> Array:
        """An initializer, as numbers also where it is quantized."""
        array = self._array(name)
        plain = name.removesuffix("_quantized")
        if plain == name:
            if array.dtype.kind != "f":
                raise CheckpointError(f"{self.path}: {name} is {array.dtype}, without a scale")
            return array
        zero = self._array(f"{plain}_zero_point").astype(np.float32)
        return (array.astype(np.float32) - zero) * self._array(f"{plain}_scale")

    def _of_blocks(self, node: Any) -> Array:
        """[N, K] of 4-bit integers in blocks along K, the first of a byte in its low half.

        (com.microsoft.MatMulNBits, ONNX Runtime's contributed operators.)
        """
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        depth, columns, block = attributes["K"], attributes["N"], attributes["block_size"]
        if attributes.get("bits", 4) != 4:
            raise CheckpointError(
                f"{self.path}: {node.name} has {attributes['bits']} bits; only 4 are supported"
            )
        if len(node.input) > 3 and any(node.input[3:]):
            raise CheckpointError(f"{self.path}: {node.name} has zero points, which are not supported")
        blocks = -(-depth // block)
        packed = self._array(node.input[1]).reshape(columns, blocks, block // 2)
        values = np.stack((packed & 15, packed >> 4), axis=-1).reshape(columns, blocks, block)
        scales = self._array(node.input[2]).reshape(columns, blocks, 1)
        numbers = (values.astype(np.float32) - 8) * scales
        return np.asarray(numbers.reshape(columns, blocks * block)[:, :depth])

    def _array(self, name: str) -> Array:
        tensor = self._initializers.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: {name} is missing")
        if tensor.data_location:
            raise CheckpointError(f"{self.path}: {name} is in a file of its own, which is not supported")
        if tensor.data_type not in _TYPES:
            raise CheckpointError(
                f"{self.path}: {name} is of type {tensor.data_type}, which is not supported"
            )
        kind = np.dtype(_TYPES[tensor.data_type])
        shape = tuple(tensor.dims)
        if tensor.raw_data:
            array = np.frombuffer(tensor.raw_data, dtype=kind)
        else:
            array = np.array(tensor.float_data or tensor.int32_data).astype(kind)
        if array.size != int(np.prod(shape)):
            raise CheckpointError(f"{self.path}: {name} has {array.size} values, not those of {list(shape)}")
        return array.reshape(shape)


def onnx_file(checkpoint: Path) -> Path | None:
    """The ONNX file of a directory, or of its folder `onnx`: model.onnx, else the only one.

    None where there is none. Raises CheckpointError where there are several.
    """
    for folder in (checkpoint, checkpoint / "onnx"):
        found = sorted(folder.glob("*.onnx"))
        named = [path for path in found if path.name == "model.onnx"]
        if len(named or found) == 1:
            return (named or found)[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{folder}: several ONNX files ({names}); leave the one that is meant")
    return None
