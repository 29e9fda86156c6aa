"""Checkpoints that are not right are refused, by the name of what is wrong; the weight algebra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_tiny_llama
from support.stack import CPU
from torch import Tensor

from salver.model.errors import CheckpointError
from salver.model.loader import CheckpointTensors, load_model
from salver.model.spec import Cat, Copy, Interleave, Optional, Source, Split, Stack, Transpose, WeightMap

UP = "model.layers.1.mlp.up_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


def load(checkpoint: Path) -> None:
    load_model(checkpoint, device=CPU, dtype=torch.float32)


def edit(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path)


def test_phases_are_told(checkpoint: Path) -> None:
    told: list[str] = []
    load_model(checkpoint, device=CPU, dtype=torch.float32, on_phase=told.append)
    assert told == ["config", "build", "weights"]


def test_a_missing_tensor(checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: tensors.pop(UP))
    with pytest.raises(CheckpointError, match=rf"{checkpoint}.*{UP} is missing"):
        load(checkpoint)


def test_an_extra_tensor(checkpoint: Path) -> None:
    extra = "model.layers.2.mlp.up_proj.weight"
    edit(checkpoint, lambda tensors: tensors.update({extra: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {extra} is not used"):
        load(checkpoint)


def test_a_misshaped_tensor(checkpoint: Path) -> None:
    """Also one of those that are laid side by side."""
    edit(checkpoint, lambda tensors: tensors.update({KEY: torch.zeros(31, 64)}))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: {KEY} has shape \[31, 64\], \[32, 64\] was expected"
    ):
        load(checkpoint)


def test_a_tensor_of_integers(checkpoint: Path) -> None:
    edit(checkpoint, lambda tensors: tensors.update({UP: torch.zeros(128, 64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{UP} is torch\.int8"):
        load(checkpoint)


@pytest.mark.parametrize("cut", [4, 200, 100_000, -1])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_file(cut: int, kind: str, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    if kind == "bin":
        tensors = load_file(path)
        path.unlink()
        path = checkpoint / "pytorch_model.bin"
        torch.save(tensors, path)
        load(checkpoint)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"{path.name}: damaged"):
        load(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, pytorch_model\.bin"):
        load(checkpoint)


def test_code_in_a_pickle_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: damaged"):
        load(checkpoint)
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    write_tiny_llama(tmp_path / "whole")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    last = sorted((tmp_path / "shards").glob("*.safetensors"))[-1]
    load(tmp_path / "shards")
    tensors = load_file(last)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, last)
    with pytest.raises(CheckpointError, match=rf"{last.name}: {name} is missing"):
        load(tmp_path / "shards")
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"{last.name}: there is no such file"):
        load(tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(last.name, "../whole/model.safetensors"))
    with pytest.raises(CheckpointError, match="no file name"):
        load(tmp_path / "shards")


# ---- the weight algebra ----

A = torch.arange(24.0).view(6, 4)
B = torch.arange(8.0).view(2, 4) + 100


def evaluate(tmp_path: Path, source: Source, shape: tuple[int, ...]) -> Tensor:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    target = torch.full(shape, float("nan"))
    CheckpointTensors(tmp_path, WeightMap({"t": source})).write(source, target)
    return target


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Copy("a"), A),
        (Transpose(Copy("a")), A.T),
        (Cat((Copy("a"), Copy("b")), (6, 2)), torch.cat((A, B))),
        (Transpose(Cat((Copy("b"), Copy("a")), (2, 6))), torch.cat((B, A)).T),
        (Cat((Transpose(Copy("a")), Transpose(Copy("b"))), (6, 2), dim=1), torch.cat((A.T, B.T), 1)),
        (Split(Copy("a"), (1, 3, 2), 1), A[1:4]),
        (Split(Copy("a"), (1, 3), 0, dim=1), A[:, :1]),
        (Interleave(Copy("a"), outer=3, inner=2), A[[0, 2, 4, 1, 3, 5]]),
        (Interleave(Copy("a"), outer=2, inner=3), A[[0, 3, 1, 4, 2, 5]]),
        (Interleave(Copy("a"), outer=3, inner=1, groups=2), A),
        (Transpose(Interleave(Transpose(Copy("a")), 2, 2)), A[:, [0, 2, 1, 3]]),
        (Interleave(Copy("a"), 2, 2, dim=1), A[:, [0, 2, 1, 3]]),
        (Interleave(Copy("a"), 2, 2, tail=2), A[[0, 2, 1, 3, 4, 5]]),
        (Interleave(Copy("a"), 2, 2, lead=1, tail=1), A[[0, 1, 3, 2, 4, 5]]),
        (Split(Copy("a"), (2, 1), 0, groups=2), A[[0, 1, 3, 4]]),
        (Split(Copy("a"), (2, 1), 1, groups=2), A[[2, 5]]),
        (Stack((Copy("a"), Copy("a"))), torch.stack((A, A))),
        (Transpose(Stack((Copy("a"), Copy("a")))), torch.stack((A.T, A.T))),
        (Cat((Interleave(Copy("a"), 3, 2), Copy("b")), (6, 2)), torch.cat((A[[0, 2, 4, 1, 3, 5]], B))),
        (Optional(Copy("a"), (6, 4), 1.0), A),
        (Optional(Copy("none"), (3,), 1.0), torch.ones(3)),
        (Cat((Copy("b"), Optional(Copy("none"), (1, 4))), (2, 1)), torch.cat((B, torch.zeros(1, 4)))),
    ],
)
def test_sources(source: Source, expected: Tensor, tmp_path: Path) -> None:
    assert torch.equal(evaluate(tmp_path, source, tuple(expected.shape)), expected)


def test_the_head_by_head_form_of_fused_projections(tmp_path: Path) -> None:
    """[heads, (q, k, v), head_dim] becomes all q, all k, all v."""
    heads = torch.arange(12.0)[:, None].expand(12, 4).contiguous()  # 2 heads of 2
    save_file({"a": heads}, tmp_path / "model.safetensors")
    source = Interleave(Copy("a"), outer=2, inner=3)
    target = torch.empty(12, 4)
    CheckpointTensors(tmp_path, WeightMap({"t": source})).write(source, target)
    assert target[:, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_optional_tensors_may_be_there_or_not(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    source = Cat((Copy("b"), Optional(Copy("a"), (1, 4))), (2, 1))
    CheckpointTensors(tmp_path, WeightMap()).check_names({"t": source})
    with pytest.raises(CheckpointError, match="tensor a is not used"):
        CheckpointTensors(tmp_path, WeightMap()).check_names({"t": Copy("b")})
    with pytest.raises(CheckpointError, match="tensor c is missing"):
        CheckpointTensors(tmp_path, WeightMap()).check_names({"t": Cat((source, Copy("c")), (3, 1))})


def test_names_that_a_family_was_published_under(tmp_path: Path) -> None:
    save_file({"model.old.a": A, "b": B}, tmp_path / "model.safetensors")
    weights = WeightMap({}, optional_prefix="model.", renames=((r"^old\.a", "new.a"),))
    target = torch.empty(6, 4)
    tensors = CheckpointTensors(tmp_path, weights)
    tensors.check_names({"t": Copy("new.a"), "u": Copy("b")})
    tensors.write(Copy("new.a"), target)
    assert torch.equal(target, A)
    save_file({"old.a": A, "new.a": A + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is there twice, under two names"):
        CheckpointTensors(tmp_path, weights)
