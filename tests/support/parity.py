"""What every family is held to: transformers' own answer, however the work is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.stack import Stack, random_prompts

TOLERANCE = 1e-4  # of float32 logits of about 10; the weights are wide, so that errors would show


def write_checkpoint(directory: Path, model_class: Any, config: Any, **save: Any) -> Path:
    """A random checkpoint of transformers' model class. Norms and biases are random too, not 1 and 0."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "weight" in name else 0.0, 0.3)
    model.save_pretrained(directory, **save)
    return directory


def oracle(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def difference(checkpoint: Path, stack: Stack | None = None, length: int = 61) -> float:
    """Largest difference of the logits of a random prompt, from the oracle's."""
    stack = stack or Stack(checkpoint)
    reference = oracle(checkpoint)
    (prompt,) = random_prompts(stack.model.spec.vocab_size, [length])
    expected = reference(torch.tensor([prompt])).logits[0]
    assert expected.std() > 0.5, "logits this flat would show nothing"
    found = [stack.logits(prompt, chunk) for chunk in (None, 7, 1)]
    return max(float((logits - expected).abs().max()) for logits in found)


@torch.inference_mode()
def assert_same_greedy_tokens(checkpoint: Path) -> None:
    """transformers' tokens, alone, in chunks, and in a mixed batch."""
    stack, reference = Stack(checkpoint), oracle(checkpoint)
    prompts = random_prompts(stack.model.spec.vocab_size, [3, 40, 1, 17, 90, 41], seed=1)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(whole[0, len(prompt) :].tolist())
    assert len({token for tokens in expected for token in tokens}) > 10
    assert [stack.greedy(prompt, 12) for prompt in prompts] == expected
    assert [stack.greedy(prompt, 12, chunk=5) for prompt in prompts] == expected
    assert stack.greedy_together(prompts, 12, chunk=16) == expected
