"""A worker without a model, for the front's tests: speaks the channel, does as its plan says.

    python fake_worker.py DIRECTORY --socket-fd N --page-fd M

DIRECTORY/plan.json holds one object per life (the last one repeats): {"fail": message},
{"exit": code, "say": text}, {"hang": true}, {"die_after_steps": n, "after_submits": m},
{"killers": [request ids], "at": position} (dies when it computes one of them there). What a
life was asked to do is written to DIRECTORY/submits.<life>. A sample's token at position p is
sum(prompt) + 1000 * sample_index + p; it ends by max_tokens. Before the first token, the
prompt's log-probabilities come one position a step.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

from salver.server.engine.channel import Channel, ChannelClosed
from salver.server.engine.config import EngineConfig
from salver.server.engine.request import (
    Abort,
    EngineRequest,
    Failed,
    FinishReason,
    Logprobs,
    Ready,
    SequenceOutput,
    Shutdown,
    StepMessage,
    Submit,
)
from salver.server.engine.status_page import StatusPage

READY = Ready("cpu", "float32", "torch", "none", "fake", 1, 64, 16, 1024, 8, 512, (("load", 0.0),))


class Sample:
    def __init__(self, request: EngineRequest, index: int, output: tuple[int, ...]) -> None:
        self.request = request
        self.index = index
        self.position = len(output)
        self.told = max(1, request.prompt_logprobs_start)

    def step(self) -> SequenceOutput:
        request = self.request
        output = SequenceOutput(request.request_id, self.index)
        if request.beams is not None:  # a search whose end never comes
            output.computing = True
            return output
        leads = self.index == request.sample_indices[0] and request.prompt_top_k is not None
        if leads and self.told < len(request.prompt_token_ids):
            output.prompt_logprobs = [Logprobs(request.prompt_token_ids[self.told], -1.0, 1)]
            self.told += 1
            return output
        output.token_ids = [sum(request.prompt_token_ids) + 1000 * self.index + self.position]
        self.position += 1
        if self.position >= request.stopping.max_tokens:
            output.finish_reason = FinishReason.LENGTH
        return output


def main() -> int:
    directory = Path(sys.argv[1])
    options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    page = StatusPage.attach(int(options["--page-fd"]))
    channel = Channel(socket.socket(fileno=int(options["--socket-fd"])))
    life = len(list(directory.glob("submits.*")))
    submits = (directory / f"submits.{life}").open("w", buffering=1)
    plans = json.loads((directory / "plan.json").read_text())
    plan = plans[min(life, len(plans) - 1)]
    if "exit" in plan:
        print(plan.get("say", ""), file=sys.stderr, flush=True)
        return plan["exit"]
    messages: list[object] = []
    while not messages:
        messages = channel.poll(0.1)
    config = messages.pop(0)
    assert isinstance(config, EngineConfig), config
    if "fail" in plan:
        channel.send(Failed(plan["fail"]))
        return 1
    while "hang" in plan:
        channel.poll(1.0)
    channel.send(READY)
    samples: list[Sample] = []
    received = steps = 0
    while True:
        messages += channel.poll(0.0 if samples else 0.1)
        started = []
        for message in messages:
            match message:
                case Submit(request):
                    received += 1
                    started.append((request.request_id, 0.0))
                    pairs = zip(request.sample_indices, request.outputs, strict=True)
                    samples += [Sample(request, index, output) for index, output in pairs]
                    line = [request.request_id, request.sample_indices, request.outputs]
                    line += [request.prompt_top_k, request.prompt_logprobs_start]
                    print(json.dumps(line), file=submits)
                case Abort(request_id, index):
                    print(json.dumps(["abort", request_id, index]), file=submits)
                    samples = [
                        s
                        for s in samples
                        if s.request.request_id != request_id or index not in (None, s.index)
                    ]
                case Shutdown():
                    return 0
        messages = []
        page.bump()
        if not samples:
            continue
        if started:
            channel.send(StepMessage([], started, None))
        if any(
            sample.request.request_id in plan.get("killers", ()) and sample.position >= plan["at"]
            for sample in samples
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        outputs = [sample.step() for sample in samples]
        samples = [s for s, o in zip(samples, outputs, strict=True) if o.finish_reason is None]
        steps += received >= plan.get("after_submits", 0)
        page.steps += 1
        channel.send(StepMessage(outputs, [], None))
        if steps == plan.get("die_after_steps"):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ChannelClosed:
        raise SystemExit(0) from None
