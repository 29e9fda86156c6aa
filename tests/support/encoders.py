"""Small random encoders of every family and head, written by transformers, and what transformers says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from salver.model.encoder import Encoder, build_encoder_batch
from salver.model.encoder_config import read_any_spec
from salver.model.encoder_loader import load_encoder
from salver.model.encoder_spec import EncoderSpec

CPU = torch.device("cpu")
VOCAB, HIDDEN, LABELS = 97, 48, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "initializer_range": 0.15,
    "num_labels": LABELS,
}
# Of each family, what its configuration is given; `max_position_embeddings` leaves room for offsets.
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": {**SIZES, "max_position_embeddings": 64, "type_vocab_size": 2},
    "Roberta": {**SIZES, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "XLMRoberta": {**SIZES, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "Camembert": {**SIZES, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "Electra": {**SIZES, "max_position_embeddings": 64, "embedding_size": 24},
    "Albert": {
        **SIZES, "max_position_embeddings": 64, "embedding_size": 24, "num_hidden_layers": 4,
        "num_hidden_groups": 2,
    },
    "MPNet": {**SIZES, "max_position_embeddings": 66},
    "DistilBert": {
        "vocab_size": VOCAB, "dim": HIDDEN, "n_layers": 3, "n_heads": 4, "hidden_dim": 80,
        "initializer_range": 0.15, "max_position_embeddings": 64, "num_labels": LABELS,
    },
    "ModernBert": {
        **SIZES, "num_hidden_layers": 4, "max_position_embeddings": 64, "local_attention": 10,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    },
    "NomicBert": {**SIZES, "max_position_embeddings": 64},
    "DebertaV2": {
        **SIZES, "max_position_embeddings": 64, "relative_attention": True, "position_buckets": 8,
        "pos_att_type": "p2c|c2p", "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu", "legacy": False,
    },
}  # fmt: skip
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def architectures() -> list[str]:
    """Every family with every head that it has; of the two that are RoBERTa by another name, a body."""
    found = [f"{family}{head}" for family in CONFIGS for head in HEADS]
    left_out = {"NomicBertForQuestionAnswering"}
    left_out |= {f"{family}{head}" for family in ("XLMRoberta", "Camembert") for head in HEADS[1:]}
    return [name for name in found if name not in left_out]


def family_of(architecture: str) -> str:
    return architecture.partition("For")[0].removesuffix("Model")


def write_encoder(directory: Path, architecture: str, **changes: Any) -> Path:
    """A random checkpoint of the architecture. Norms and biases are random too, not 1 and 0."""
    import transformers

    family = family_of(architecture)
    if architecture.endswith("QuestionAnswering"):
        changes = {"num_labels": 2, **changes}
    config = getattr(transformers, f"{family}Config")(**{**CONFIGS[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "weight" in name else 0.0, 0.3)
    model.save_pretrained(directory)
    return directory


class Oracle:
    """transformers' own model, in float32 with the plainest attention."""

    def __init__(self, checkpoint: Path, architecture: str) -> None:
        import transformers

        self.architecture = architecture
        self.model: Any = getattr(transformers, architecture).from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, token_ids: list[int], segments: list[int] | None = None) -> torch.Tensor:
        """[labels], [n, labels], or the hidden states [n, hidden] of a body."""
        kinds = {"token_type_ids": torch.tensor([segments])} if segments is not None else {}
        ids = torch.tensor([token_ids])
        out = self.model(ids, attention_mask=torch.ones_like(ids), **kinds)
        if self.architecture.endswith("QuestionAnswering"):
            return torch.stack((out.start_logits[0], out.end_logits[0]), dim=-1)
        found: torch.Tensor = (out.last_hidden_state if self.architecture.endswith("Model") else out.logits)[
            0
        ]
        return found


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    spec = read_any_spec(checkpoint)
    assert isinstance(spec, EncoderSpec)
    return load_encoder(checkpoint, spec, device=CPU, dtype=dtype)


@torch.inference_mode()
def answers(
    model: Encoder, inputs: list[list[int]], segments: list[list[int]] | None = None, row_multiple: int = 1
) -> list[torch.Tensor]:
    """What `Oracle` gives for each, of one batch in this order."""
    kinds = segments or [[] for _ in inputs]
    batch = build_encoder_batch(model.spec, inputs, kinds, row_multiple=row_multiple, device=CPU)
    hidden = model(batch)
    found = []
    for first, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        rows = hidden[first:end]
        head = model.spec.head
        if head is None:
            found.append(rows)
        elif head.reads == "input":
            row = rows[:1] if head.pooling == "cls" else rows.mean(0, keepdim=True)
            found.append(model.scores(row)[0])
        else:
            found.append(model.scores(rows))
    return found
