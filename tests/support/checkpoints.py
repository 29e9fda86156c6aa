"""Small random checkpoints, written by transformers, that a test can serve in a second."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS = 0, 1
# Past the 256 bytes: <s>, </s> and a few merges, so that tokens are not all one byte.
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "a"), ("Ġ", "the"), ("e", "r"), ("o", "n")]
VOCAB_SIZE = 2 + 256 + len(MERGES)
CONTEXT = 512


def write_tokenizer(directory: Path, chat_template: str | None) -> None:
    """A byte-level BPE tokenizer that gives a prompt no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    assert len(vocabulary) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(directory)


def write_tiny_llama(directory: Path, *, seed: int = 0, context: int = CONTEXT) -> Path:
    """LlamaForCausalLM with grouped queries. The weights are larger than usual, so that tokens vary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory, CHAT_TEMPLATE)
    return directory


def write_tiny_gpt2(directory: Path, *, seed: int = 0, context: int = CONTEXT) -> Path:
    """GPT2LMHeadModel, without a chat template."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=context,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    write_tokenizer(directory, None)
    return directory


class Reference:
    """transformers' own model, as the oracle."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def greedy(self, prompt: list[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        """The tokens that generate() adds to `prompt`, its end-of-sequence token included."""
        import torch

        eos = self.model.generation_config.eos_token_id
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None if ignore_eos else eos,
                pad_token_id=0,
            )
        tokens: list[int] = whole[0, len(prompt) :].tolist()
        return tokens
