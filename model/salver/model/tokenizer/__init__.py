"""Text to token ids and back: the checkpoint's tokenizer, and its incremental detokenizer. No torch."""

from .detokenizer import Detokenizer
from .tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
