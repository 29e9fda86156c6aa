"""Our metrics under the names that vLLM and text-embeddings-inference give theirs.

Only names and labels differ: the values are those of `salver_*`, whose families are read when
Prometheus asks. So boards, KEDA examples and gateways made for those servers work. A metric of
theirs that we have no equal of is left out rather than made up.

Sources: vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py of vLLM 0.32; router/ and core/ of
text-embeddings-inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

FLAVORS = ("vllm", "tei")


@dataclass(frozen=True, slots=True)
class _Flavor:
    """Family names without `_total`: theirs to ours; labels of ours to theirs; labels that are added."""

    families: Mapping[str, str]
    labels: Mapping[str, str]
    added: Mapping[str, str] = field(default_factory=dict)
    totals: bool = True  # whether their counters end in _total


_VLLM = _Flavor(
    {
        "vllm:num_requests_running": "salver_num_requests_running",
        "vllm:num_requests_waiting": "salver_num_requests_waiting",
        "vllm:kv_cache_usage_perc": "salver_kv_cache_usage_ratio",
        "vllm:num_preemptions": "salver_preemptions",
        "vllm:prefix_cache_queries": "salver_prefix_cache_queries",
        "vllm:prefix_cache_hits": "salver_prefix_cache_hits",
        "vllm:prompt_tokens": "salver_prompt_tokens",
        "vllm:generation_tokens": "salver_generation_tokens",
        "vllm:iteration_tokens_total": "salver_batch_tokens",
        "vllm:request_success": "salver_request_success",
        "vllm:request_prompt_tokens": "salver_request_prompt_tokens",
        "vllm:request_generation_tokens": "salver_request_generation_tokens",
        "vllm:request_max_num_generation_tokens": "salver_request_max_generation_tokens",
        "vllm:time_to_first_token_seconds": "salver_time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds": "salver_inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds": "salver_e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds": "salver_request_queue_time_seconds",
        "vllm:request_prefill_time_seconds": "salver_request_prefill_time_seconds",
        "vllm:request_decode_time_seconds": "salver_request_decode_time_seconds",
        "vllm:lora_requests_info": "salver_lora_requests_info",
        "vllm:spec_decode_num_draft_tokens": "salver_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens": "salver_accepted_draft_tokens",
    },
    {"model": "model_name", "finish_reason": "finished_reason"},
    {"engine": "0"},
)
_TEI = _Flavor(
    {
        "te_queue_size": "salver_num_requests_waiting",
        "te_batch_next_tokens": "salver_batch_tokens",
        "te_batch_next_size": "salver_batch_sequences",
        "te_request_duration": "salver_e2e_request_latency_seconds",
        "te_request_queue_duration": "salver_request_queue_time_seconds",
        "te_request_inference_duration": "salver_request_prefill_time_seconds",
        "te_request_success": "salver_request_success",
    },
    {},
    totals=False,
)
_BY_NAME = {"vllm": _VLLM, "tei": _TEI}


class ExposedMetrics(Collector):
    """What is exposed: `registry`, and the same under the names of `flavor` where there is one."""

    def __init__(self, registry: CollectorRegistry, flavor: str | None) -> None:
        self._registry = registry
        self._flavor = _BY_NAME[flavor] if flavor is not None else None

    def collect(self) -> Iterator[Metric]:
        families = {family.name: family for family in self._registry.collect()}
        yield from families.values()
        if self._flavor is not None:
            for theirs, ours in self._flavor.families.items():
                yield _renamed(families[ours], theirs, self._flavor)


def exposed(registry: CollectorRegistry, flavor: str | None) -> CollectorRegistry:
    """The registry for the metrics endpoint."""
    made = CollectorRegistry()
    made.register(ExposedMetrics(registry, flavor))
    return made


def _renamed(family: Metric, name: str, flavor: _Flavor) -> Metric:
    # The text format ends a counter's name in _total; without it, a series is of no type.
    bare = family.type == "counter" and not flavor.totals
    renamed = Metric(name, family.documentation, "unknown" if bare else family.type)
    for sample in family.samples:
        labels = {flavor.labels.get(label, label): value for label, value in sample.labels.items()}
        sample_name = name if bare else name + sample.name.removeprefix(family.name)
        renamed.samples.append(Sample(sample_name, {**labels, **flavor.added}, sample.value))
    return renamed
