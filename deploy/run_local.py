"""`make run`: serve a model on this machine, ask it one question, go on until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
from pathlib import Path

SALVER = str(Path(sys.executable).with_name("salver"))


def follow(server: subprocess.Popen[str], serving: threading.Event) -> None:
    """Print the server's lines as they come; set `serving` at its "serving NAME on ..." or at its end."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("serving "):
            serving.set()
    serving.set()


def ask(address: str, question: str) -> subprocess.Popen[bytes]:
    """Put a question through the client, which streams the answer to the terminal."""
    print(f"\n$ salver chat --address {address} --temperature 0 {question!r}", flush=True)
    return subprocess.Popen(
        [SALVER, "chat", "--address", address, "--temperature", "0", question], stdin=subprocess.DEVNULL
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--metrics-port", type=int, default=9090)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("serve_args", nargs="*", help="further flags of `salver serve`, after --")
    args = parser.parse_args()
    command = [SALVER, "serve", args.model, "--host", args.host, "--port", str(args.port)]
    command += ["--metrics-port", str(args.metrics_port), *args.serve_args]
    # A session of its own: the terminal sends Ctrl-C to its whole process group, and the
    # server shall get one signal, from us, not two.
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    ending = threading.Event()
    asking: list[subprocess.Popen[bytes]] = []

    def end(signum: int, frame: object) -> None:
        ending.set()
        for process in (*asking, server):
            process.terminate()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, end)
    serving = threading.Event()
    follower = threading.Thread(target=follow, args=(server, serving), daemon=True)
    follower.start()
    serving.wait()
    failed = 0
    if server.poll() is None and not ending.is_set():
        host = "127.0.0.1" if args.host in ("0.0.0.0", "::", "[::]") else args.host
        asking.append(ask(f"{host}:{args.port}", args.question))
        failed = asking[0].wait()
        if ending.is_set():
            failed = 0
        elif failed:
            print("the sample question failed", file=sys.stderr)
            server.terminate()
        else:
            print(f"\nServing on {args.host}:{args.port}; Ctrl-C ends it.", flush=True)
    returncode = server.wait()
    follower.join(timeout=5)
    return returncode or failed


if __name__ == "__main__":
    sys.exit(main())
