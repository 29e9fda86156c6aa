"""From logits to tokens: processing steps, the draw, log-probabilities."""

from salver.model.sampling.candidates import candidates
from salver.model.sampling.distribution import StepDistribution, distributions
from salver.model.sampling.logprobs import TokenLogprobs, token_logprobs
from salver.model.sampling.rows import SamplingRow
from salver.model.sampling.sampler import INVALID, choose, sample
from salver.model.sampling.steps import STEPS, Step

__all__ = [
    "INVALID",
    "STEPS",
    "SamplingRow",
    "Step",
    "StepDistribution",
    "TokenLogprobs",
    "candidates",
    "choose",
    "distributions",
    "sample",
    "token_logprobs",
]
