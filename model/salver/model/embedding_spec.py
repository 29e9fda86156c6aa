"""What a sentence-transformers directory says of its embeddings. No torch: the front reads it too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from .config_reader import ConfigReader, read_json
from .errors import CheckpointError
from .pooling import MODES

MAX_LIMIT = 10**9
# What the first module says of itself; early versions had a file for each family.
_SETTINGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu"}


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """A linear map of the pooled vector; its tensors are in `directory`, under the checkpoint's."""

    directory: str
    in_features: int
    out_features: int
    bias: bool
    activation: str  # identity | tanh | relu


@dataclass(frozen=True, slots=True)
class EmbeddingSpec:
    """How hidden states become a text's vector: pooling, dense maps, normalization, prompts."""

    pooling: tuple[str, ...] = ("mean",)  # of MODES
    dense: tuple[DenseSpec, ...] = ()
    normalize: bool = False
    max_tokens: int | None = None  # what the module truncates to
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)  # name to what is put before the text
    default_prompt_name: str | None = None

    def dimensions(self, hidden_size: int) -> int:
        """Of the vector."""
        return self.dense[-1].out_features if self.dense else len(self.pooling) * hidden_size


def read_embedding_spec(checkpoint: Path) -> EmbeddingSpec:
    """Of modules.json and the files beside it; where there is none, the mean of all tokens.

    Raises CheckpointError, naming the file and what is not implemented.
    """
    path = checkpoint / "modules.json"
    if not path.is_file():
        return EmbeddingSpec()
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path}: a list of modules was expected")
    pooling: tuple[str, ...] = ()
    dense: list[DenseSpec] = []
    normalize = False
    for place, module in enumerate(modules):
        kind, where = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if Path(where).is_absolute() or ".." in Path(where).parts:
            raise CheckpointError(f"{path}: the module path {where!r} leads out of the checkpoint")
        if kind == "Transformer" and place == 0 and where in ("", "."):
            continue
        if kind == "Pooling" and not pooling and not dense:
            pooling = _pooling(checkpoint / where / "config.json")
        elif kind == "Dense" and pooling and not normalize:
            dense.append(_dense(checkpoint, where))
        elif kind == "Normalize" and pooling:
            _check_normalize(checkpoint / where / "config.json")
            normalize = True
        elif kind == "Dropout":
            continue  # of training
        else:
            raise CheckpointError(
                f"{path}: module {place}, {module.get('type')!r} in {where!r}, is not supported there "
                "(supported: Transformer, Pooling, Dense, Normalize, in this order, and Dropout)"
            )
    if not pooling:
        raise CheckpointError(f"{path}: no Pooling module")
    return EmbeddingSpec(pooling, tuple(dense), normalize, **_sentence_settings(checkpoint))  # type: ignore[arg-type]


def _pooling(path: Path) -> tuple[str, ...]:
    c = ConfigReader(read_json(path), str(path))
    c.only("include_prompt", True)
    for name in ("word_embedding_dimension", "embedding_dimension"):
        c.size(name, 1)
    found = list(c.words("pooling_mode"))  # as newer versions write it: one, or a list in their order
    if unknown := [mode for mode in found if mode not in MODES]:
        raise c.error("pooling_mode", f"is {unknown[0]!r}, which is not supported")
    flagged = []
    for mode in MODES:
        flag = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}.get(mode, mode)
        if c.boolean(f"pooling_mode_{flag}", False):
            flagged.append(mode)
    c.refuse_unread()
    found = found or flagged
    if not found:
        raise c.error("pooling_mode", "is missing, and no pooling_mode_... is true")
    return tuple(found)


def _check_normalize(path: Path) -> None:
    """Newer versions write what it normalizes."""
    if path.is_file():
        c = ConfigReader(read_json(path), str(path))
        c.only("module_input_name", "sentence_embedding")
        c.only("module_output_name", "sentence_embedding")
        c.refuse_unread()


def _dense(checkpoint: Path, where: str) -> DenseSpec:
    path = checkpoint / where / "config.json"
    c = ConfigReader(read_json(path), str(path))
    function = c.choice(
        "activation_function",
        tuple(
            f"torch.nn.modules.{'linear' if name == 'Identity' else 'activation'}.{name}"
            for name in _ACTIVATIONS
        ),
        "torch.nn.modules.activation.Tanh",
    )
    for name, default in (
        ("module_input_name", "sentence_embedding"),
        ("module_output_name", "sentence_embedding"),
    ):
        c.only(name, default)
    spec = DenseSpec(
        where,
        c.size("in_features"),
        c.size("out_features"),
        c.boolean("bias", True),
        _ACTIVATIONS[function.rpartition(".")[2]],
    )
    c.refuse_unread()
    return spec


def _sentence_settings(checkpoint: Path) -> dict[str, object]:
    settings: dict[str, object] = {}
    path = next((p for name in _SETTINGS if (p := checkpoint / name).is_file()), None)
    if path is not None:
        c = ConfigReader(read_json(path), str(path))
        settings["max_tokens"] = c.size("max_seq_length") if c.has("max_seq_length") else None
        settings["lower_case"] = c.boolean("do_lower_case", False)
        _check_transformer(c)
    if settings.get("max_tokens") is None:
        settings["max_tokens"] = _tokenizer_limit(checkpoint)
    path = checkpoint / "config_sentence_transformers.json"
    if path.is_file():
        config = read_json(path)
        prompts = config.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise CheckpointError(f"{path}: prompts must be an object of texts")
        default = config.get("default_prompt_name")
        if default is not None and default not in prompts:
            raise CheckpointError(f"{path}: default_prompt_name {default!r} is not one of its prompts")
        settings["prompts"] = prompts
        settings["default_prompt_name"] = default
    return settings


def _check_transformer(c: ConfigReader) -> None:
    """What newer versions say of the first module beside what older ones say."""
    c.only("transformer_task", "feature-extraction")
    c.only("module_output_name", "token_embeddings")
    for name in ("query_length", "document_length", "query_expansion"):  # of models with a vector a token
        c.only(name, None)
    modalities = c.section("modality_config")
    text = modalities.section("text") if modalities is not None else None
    if text is not None:
        text.only("method", "forward")
        text.only("method_output_name", "last_hidden_state")


def _tokenizer_limit(checkpoint: Path) -> int | None:
    """Newer versions leave it to the tokenizer, whose limit may be a number that means none."""
    path = checkpoint / "tokenizer_config.json"
    limit = read_json(path).get("model_max_length") if path.is_file() else None
    return int(limit) if isinstance(limit, int | float) and 0 < limit < MAX_LIMIT else None
