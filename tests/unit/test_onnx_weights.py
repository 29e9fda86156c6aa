"""Weights out of an ONNX export: names, transposed matrices, 4 and 8 bits; refusals name the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salver.model.errors import CheckpointError
from salver.model.onnx_weights import model_class, onnx_file
from salver.model.weights import open_weights

DENSE = "bert.encoder.layer.0.intermediate.dense"
NODE = "/bert/encoder/layer.0/intermediate/dense/MatMul"
KINDS = {"float32": 1, "uint8": 2, "int8": 3, "int64": 7, "float16": 10}


def add(model: Any, name: str, array: Any, *, raw: bool = True) -> None:
    array = np.asarray(array)
    tensor = model.graph.initializer.add(name=name, data_type=KINDS[array.dtype.name], dims=list(array.shape))
    if raw:
        tensor.raw_data = array.tobytes()
    elif array.dtype.kind == "f":
        tensor.float_data.extend(array.ravel().tolist())
    else:
        tensor.int32_data.extend(array.ravel().tolist())


def write(directory: Path, model: Any, name: str = "onnx/model_q4.onnx") -> Path:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def read(directory: Path) -> dict[str, Any]:
    return {name: file.read(name).numpy() for name, file in open_weights(directory).items()}


def test_plain_and_eight_bits(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    model = model_class()()
    bias, matrix = draw.normal(size=6).astype(np.float32), draw.normal(size=(4, 6)).astype(np.float32)
    add(model, f"{DENSE}.bias", bias)
    add(model, "onnx::MatMul_7", matrix.astype(np.float16))
    model.graph.node.add(name=NODE, op_type="MatMul", input=["x", "onnx::MatMul_7"])
    # One scale for all, in the fields of single values; and one for each column.
    table = draw.integers(0, 255, (9, 4)).astype(np.uint8)
    add(model, "bert.embeddings.word_embeddings.weight_quantized", table)
    add(model, "bert.embeddings.word_embeddings.weight_scale", np.float32(0.25), raw=False)
    add(model, "bert.embeddings.word_embeddings.weight_zero_point", np.uint8(87), raw=False)
    columns = draw.integers(-127, 127, (4, 6)).astype(np.int8)
    scales = draw.random(6).astype(np.float32)
    add(model, "onnx::MatMul_8_quantized", columns)
    add(model, "onnx::MatMul_8_scale", scales)
    add(model, "onnx::MatMul_8_zero_point", np.zeros(6, np.int8))
    model.graph.node.add(
        name="/classifier/MatMul_quant", op_type="MatMulInteger", input=["x", "onnx::MatMul_8_quantized"]
    )
    add(model, "/bert/Constant_output_0", np.int64([3]))  # of the graph's own arithmetic
    write(tmp_path, model)
    found = read(tmp_path)
    words = "bert.embeddings.word_embeddings.weight"
    assert found.keys() == {f"{DENSE}.bias", f"{DENSE}.weight", words, "classifier.weight"}
    np.testing.assert_array_equal(found[f"{DENSE}.bias"], bias)
    np.testing.assert_array_equal(found[f"{DENSE}.weight"], matrix.astype(np.float16).T.astype(np.float32))
    np.testing.assert_allclose(found[words], (table.astype(np.float32) - 87) * 0.25)
    np.testing.assert_allclose(found["classifier.weight"], (columns * scales).T, rtol=1e-6)


def of_blocks(model: Any, values: Any, scales: Any, block: int, **more: Any) -> None:
    """Integers 0 to 15 [N, blocks, block] and their scales [N, blocks] as MatMulNBits has them."""
    add(model, "q", (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8))
    add(model, "s", scales.ravel())
    node = model.graph.node.add(name=f"{NODE}_Q4", op_type="MatMulNBits", input=["x", "q", "s"])
    fields = {"K": block * values.shape[1] - 3, "N": len(values), "bits": 4, "block_size": block, **more}
    for name, value in fields.items():
        node.attribute.add(name=name, i=value)


def test_four_bits(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    values, scales = draw.integers(0, 16, (5, 3, 16)), draw.random((5, 3)).astype(np.float32)
    model = model_class()()
    of_blocks(model, values, scales, 16)
    write(tmp_path, model, "model.onnx")
    (found,) = read(tmp_path).values()
    wanted = ((values - 8) * scales[..., None]).reshape(5, 48)[:, :45]  # the last block is not whole
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_is_not_understood_is_named(tmp_path: Path) -> None:
    values, scales = np.zeros((2, 1, 16), np.int64), np.ones((2, 1), np.float32)
    model = model_class()()
    of_blocks(model, values, scales, 16, bits=8)
    path = write(tmp_path, model)
    with pytest.raises(CheckpointError, match="has 8 bits; only 4"):
        read(tmp_path)
    model = model_class()()
    of_blocks(model, values, scales, 16)
    model.graph.node[0].input.append("zeros")
    write(tmp_path, model)
    with pytest.raises(CheckpointError, match="zero points"):
        read(tmp_path)
    model = model_class()()
    add(model, f"{DENSE}.bias", np.ones(3, np.float32))
    model.graph.initializer[0].data_location = 1
    write(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"dense\.bias is in a file of its own"):
        read(tmp_path)
    model.graph.initializer[0].data_location = 0
    model.graph.initializer[0].dims[0] = 4
    write(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"dense\.bias has 3 values"):
        read(tmp_path)
    path.write_bytes(b"\xff\xff\xff")
    with pytest.raises(CheckpointError, match="not an ONNX file"):
        read(tmp_path)
    write(tmp_path, model_class()())
    with pytest.raises(CheckpointError, match="no tensor in it"):
        read(tmp_path)
    write(tmp_path, model_class()(), "onnx/model_int8.onnx")
    with pytest.raises(CheckpointError, match="several ONNX files"):
        onnx_file(tmp_path)
    plain = write(tmp_path, model_class()(), "onnx/model.onnx")
    assert onnx_file(tmp_path) == plain
