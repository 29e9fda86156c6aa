"""From a checkpoint directory to a model on its device, tensor by tensor.

The model is built without memory, then each parameter is allocated and filled by itself: at any
time one copy of the weights exists, and the part of the file that is being read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .arithmetic import LoadedTensor, source_names
from .attention import choose
from .config_reader import read_spec
from .errors import CheckpointError
from .parallel import Part, Ranks, Sharding, connect
from .spec import (
    Cat,
    Copy,
    Either,
    Mxfp4,
    Optional,
    Source,
    Split,
    Stack,
    Taps,
    Transpose,
    WeightMap,
    names_of,
)
from .transfer import Staging
from .transformer import Transformer
from .weights import WeightFile, open_weights

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(
    checkpoint: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    numerics: str = "exact",
    on_phase: Callable[[str], None] | None = None,
    ranks: Ranks | None = None,
) -> Transformer:
    """The model of a checkpoint directory, ready to compute.

    With `ranks`, this rank's part of it. `on_phase` is told what is done: "config", "build", "weights".
    Raises CheckpointError, naming file, field or tensor, for what is missing, unused, of another shape,
    damaged or not implemented.
    """
    tell = on_phase or (lambda _: None)
    spec = read_spec(checkpoint)
    tell("config")
    attention = choose(device, numerics, dtype, sources=spec.encoder is not None)
    sharding = None if ranks is None else Sharding(spec, ranks.rank, ranks.size)
    with torch.device("meta"):
        model = Transformer(sharding.local_spec if sharding else spec, attention)
        whole = Transformer(spec, attention) if sharding else model
    if ranks is not None and sharding is not None:
        connect(model, sharding, ranks)
    model.eval()
    model.place(device)
    tell("build")
    model.loaded = fill_parameters(
        model, checkpoint, spec.weights, spec.num_layers, spec.architecture, dtype=dtype, device=device,
        whole=whole, part=sharding.part if sharding else None,
    )  # fmt: skip
    model.checkpoint = checkpoint
    tell("weights")
    return model


def fill_parameters(
    model: nn.Module,
    checkpoint: Path,
    weights: WeightMap,
    num_layers: int,
    architecture: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    whole: nn.Module | None = None,
    part: Callable[[str], Part | None] | None = None,
) -> tuple[LoadedTensor, ...]:
    """Gives every parameter of a model on the meta device its values. What was loaded.

    `part` says what of the same parameter of `whole` it is, where it is not all. Raises CheckpointError.
    """
    shapes = {name: parameter.shape for name, parameter in (whole or model).named_parameters()}
    loaded = []
    tensors = CheckpointTensors(checkpoint, weights, Staging(device))
    sources = weights.expanded(num_layers)
    tensors.check_names(sources)
    for name, parameter in list(model.named_parameters()):
        mine = None if part is None else part(name)
        host = torch.device("cpu")
        target = torch.empty(shapes[name], dtype=dtype, device=device if mine is None else host)
        source = sources.pop(name, None)
        if source is None:
            raise ValueError(f"{architecture}: the weight map says nothing of {name}")
        tensors.write(source, target)
        if mine is not None:
            target = mine.of(target).to(device)
            if target.shape != parameter.shape:
                raise ValueError(f"{name}: {list(target.shape)} of {list(parameter.shape)}")
        _set_parameter(model, name, target)
        names = source_names(source, tensors.full_name)
        loaded.append(LoadedTensor(name, names, tuple(shapes[name]), str(dtype).removeprefix("torch.")))
    if sources:
        raise ValueError(f"{architecture}: the model has no {', '.join(sources)}")
    tensors.check_duplicates()
    return tuple(loaded)


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(value, requires_grad=False))


class SourceWriter:
    """Evaluates sources; what a name stands for, a subclass says."""

    def write(self, source: Source, target: Tensor) -> None:
        """Fills `target` (a parameter or a view of one); raises CheckpointError for another shape."""
        if isinstance(source, Copy):
            self._copy(source.name, target)
        elif isinstance(source, Transpose):
            self.write(source.source, target.transpose(-1, -2))
        elif isinstance(source, Taps):
            taps = torch.unflatten(target, 1, (source.size, -1))
            self.write(source.source, taps.transpose(1, 2))
        elif isinstance(source, Cat):
            if sum(source.sizes) != target.shape[source.dim] or len(source.sizes) != len(source.sources):
                raise ValueError(f"{source.sizes} do not make up {list(target.shape)}")
            for part, view in zip(
                source.sources, torch.split(target, list(source.sizes), source.dim), strict=True
            ):
                self.write(part, view)
        elif isinstance(source, Stack):
            for part, view in zip(source.sources, target, strict=True):
                self.write(part, view)
        elif isinstance(source, Optional):
            if all(self._has(name) for name in names_of(source.source)):
                self.write(source.source, target)
            elif target.shape == source.shape:
                target.fill_(source.fill)
            else:
                raise ValueError(f"{source.shape} cannot fill {list(target.shape)}")
        elif isinstance(source, Either):
            self.write(self._first_of(source), target)
        elif isinstance(source, Mxfp4):
            self._unpack(source, target)
        elif isinstance(source, Split):
            shape = list(target.shape)
            shape[source.dim] = source.groups * sum(source.sizes)
            whole = torch.empty(shape, dtype=target.dtype, device=target.device)
            self.write(source.source, whole)
            runs = torch.unflatten(whole, source.dim, (source.groups, -1))
            parts = torch.split(runs, list(source.sizes), source.dim + 1)
            target.copy_(parts[source.index].flatten(source.dim, source.dim + 1))
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            self.write(source.source, whole)
            mine, theirs = (
                torch.unflatten(tensor.movedim(source.dim, 0), 0, (source.groups, -1))
                for tensor in (target, whole)
            )
            mine.copy_(theirs)
            # [groups, inner, outer, rest] of the target, seen as the source's.
            turned = slice(source.lead, mine.shape[1] - source.tail)
            moved = torch.unflatten(mine[:, turned], 1, (source.inner, source.outer, -1)).transpose(1, 2)
            moved.copy_(torch.unflatten(theirs[:, turned], 1, (source.outer, source.inner, -1)))

    def _first_of(self, source: Either) -> Copy:
        return next((copy for copy in source.sources if self._has(copy.name)), source.sources[0])

    def _has(self, name: str) -> bool:
        raise NotImplementedError

    def _copy(self, name: str, target: Tensor) -> None:
        raise NotImplementedError

    def _unpack(self, source: Mxfp4, target: Tensor) -> None:
        raise NotImplementedError


class CheckpointTensors(SourceWriter):
    """The tensors of a checkpoint under the names that a weight map uses."""

    def __init__(self, checkpoint: Path, weights: WeightMap, staging: Staging | None = None) -> None:
        """`staging` copies to the device; None: the host does."""
        self._checkpoint = checkpoint
        self._staging = staging or Staging(torch.device("cpu"))
        self._weights = weights
        self._files: dict[str, tuple[WeightFile, str]] = {}  # name without prefix: file, name in it
        for full_name, file in open_weights(checkpoint).items():
            name = full_name.removeprefix(weights.optional_prefix)
            for pattern, replacement in weights.renames:
                name = re.sub(f"{pattern}$", replacement, name)
            if name in self._files:
                raise CheckpointError(f"{file.path}: {full_name} is there twice, under two names")
            self._files[name] = (file, full_name)

    def full_name(self, name: str) -> str:
        """As the checkpoint's files have it; one that they don't have (it is optional) as it is."""
        return self._files[name][1] if name in self._files else name

    def check_names(self, sources: dict[str, Source]) -> None:
        """Raises CheckpointError for tensors that are missing and for those that nothing reads."""
        required, known = set[str](), set[str]()
        for source in sources.values():
            if isinstance(source, Either):
                known.update(names_of(source))
                required.add(self._first_of(source).name)
                continue
            (known if isinstance(source, Optional) else required).update(names_of(source))
            required -= _optional_names(source)
            known |= _optional_names(source)
        missing = sorted(required - self._files.keys())
        if missing:
            raise CheckpointError(f"{self._checkpoint}: tensor {_listed(missing)} missing")
        known |= required | {name for name, _ in self._weights.duplicates}
        ignored = [re.compile(pattern) for pattern in self._weights.ignored]
        unused = sorted(
            name
            for name in self._files.keys() - known
            if not any(pattern.fullmatch(name) for pattern in ignored)
        )
        if unused:
            file, full_name = self._files[unused[0]]
            raise CheckpointError(
                f"{file.path}: tensor {_listed([full_name, *unused[1:]])} not used by this architecture"
            )

    def check_duplicates(self) -> None:
        """Raises CheckpointError where a tensor that should be a copy of another is not."""
        for name, original in self._weights.duplicates:
            if name not in self._files or original not in self._files:
                continue
            if not torch.equal(self._read(name), self._read(original)):
                file, full_name = self._files[name]
                raise CheckpointError(
                    f"{file.path}: {full_name} differs from {self._files[original][1]}, "
                    "though config.json ties them (tie_word_embeddings)"
                )

    def _has(self, name: str) -> bool:
        return name in self._files

    def _copy(self, name: str, target: Tensor) -> None:
        tensor = self._read(name)
        if tensor.shape != target.shape:
            file, full_name = self._files[name]
            raise CheckpointError(
                f"{file.path}: {full_name} has shape {list(tensor.shape)}, {list(target.shape)} was expected"
            )
        self._staging.copy(tensor, target)

    def _unpack(self, source: Mxfp4, target: Tensor) -> None:
        """Fills a target [..., rows, columns], matrix by matrix."""
        *before, rows, columns = target.shape
        blocks = self._packed(source.blocks, [*before, rows, columns // 32, 16])
        scales = self._packed(source.scales, [*before, rows, columns // 32])
        values = torch.tensor(FP4)
        matrices = zip(
            target.view(-1, rows, columns),
            blocks.reshape(-1, rows, columns // 32, 16),
            scales.reshape(-1, rows, columns // 32),
            strict=True,
        )
        for matrix, packed, scale in matrices:
            pairs = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(2).int()
            matrix.copy_(torch.ldexp(values[pairs], scale.int()[..., None] - 127).flatten(1))

    def _packed(self, name: str, shape: list[int]) -> Tensor:
        tensor = self._read(name, (torch.uint8,))
        if list(tensor.shape) != shape:
            file, full_name = self._files[name]
            raise CheckpointError(
                f"{file.path}: {full_name} has shape {list(tensor.shape)}, {shape} was expected"
            )
        return tensor

    def _read(self, name: str, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> Tensor:
        file, full_name = self._files[name]
        tensor = file.read(full_name)
        if tensor.dtype not in dtypes:
            supported = ", ".join(map(str, dtypes))
            raise CheckpointError(
                f"{file.path}: {full_name} is {tensor.dtype}, which is not supported (supported: {supported})"
            )
        return tensor


def _optional_names(source: Source) -> set[str]:
    """Names that stand under an `Optional` somewhere in the source."""
    if isinstance(source, Optional):
        return set(names_of(source))
    if isinstance(source, Copy | Either | Mxfp4):
        return set()
    parts = source.sources if isinstance(source, Cat | Stack) else (source.source,)
    return set[str]().union(*(_optional_names(part) for part in parts))


def _listed(names: list[str]) -> str:
    """A few names and how many more, with the verb."""
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"
