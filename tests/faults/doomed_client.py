"""python doomed_client.py ADDRESS STREAMS: begins streams, says so on stdout, reads until it is killed."""

from __future__ import annotations

import sys

import grpc
from support import calls

from salver.v1 import generation_pb2_grpc

if __name__ == "__main__":
    address, streams = sys.argv[1], int(sys.argv[2])
    stub = generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(address))
    running = [
        stub.StreamGenerate(
            calls.stream_request(f"doomed {i}", max_tokens=1500, ignore_eos=True, n=1 + i % 2), timeout=120
        )
        for i in range(streams)
    ]
    for stream in running:
        next(stream)
    print("running", flush=True)
    for stream in running:
        for _ in stream:
            pass
