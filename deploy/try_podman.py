"""Runs the Deployment of deploy/kubernetes on this machine by `podman kube play`, and looks at it.

    python deploy/try_podman.py localhost/salver:0.1.0-cpu

As root, with podman, crun, kubectl and the image of deploy/Containerfile in the local storage (vfs).
What podman does not do: probes, preStop, Services, PodDisruptionBudgets, topology spread. What it does:
the image under the manifest's uid, its read-only root, dropped capabilities and volumes, the init
container that fetches, the configuration from the ConfigMap, and SIGTERM with the grace. The pod is in
the host's network, where the caller is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from salver.client import Client, ConnectionOptions

REPOSITORY = Path(__file__).resolve().parents[1]
# For machines where pods may not raise their limits, and systemd is not there.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
"""
STREAMED = 64  # tokens, a few seconds of a busy machine
SHOWN = ("Uid", "CapEff", "NoNewPrivs", "Seccomp:")  # of /proc/PID/status


def manifests(
    overlay: str, image: str, settings: dict[str, Any], models: Path | None
) -> list[dict[str, Any]]:
    """What podman is given of an overlay: the Deployment, once, in the host's network, and its ConfigMap.

    `models` is a directory in place of the volume of that name.
    """
    built = subprocess.run(
        ["kubectl", "kustomize", str(REPOSITORY / "deploy" / "kubernetes" / "overlays" / overlay)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    objects = [
        item for item in yaml.safe_load_all(built.stdout) if item["kind"] in ("ConfigMap", "Deployment")
    ]
    for item in objects:
        if item["kind"] == "ConfigMap":
            text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
            lines = item["data"]["salver.toml"].splitlines(keepends=True)
            item["data"]["salver.toml"] = text + "".join(
                line for line in lines if line.partition("=")[0].strip() not in settings
            )
            continue
        item["spec"]["replicas"] = 1
        # Or podman removes it when it has ended, and 4.3 fails where that took more than a moment.
        notes = item["metadata"].setdefault("annotations", {})
        notes["io.podman.annotations.init.container.type"] = "always"
        pod = item["spec"]["template"]["spec"]
        pod["hostNetwork"] = True
        for volume in pod["volumes"]:
            if volume["name"] == "models" and models is not None:
                volume.pop("emptyDir", None)
                volume["hostPath"] = {"path": str(models.absolute()), "type": "Directory"}
        for container in [*pod["initContainers"], *pod["containers"]]:
            container["image"] = image
            container["imagePullPolicy"] = "Never"
            container.pop("ports", None)  # podman maps them, which the host's network has not
    return objects


def podman(*words: str, check: bool = True) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"podman {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image")
    parser.add_argument("--overlay", default="cpu")
    parser.add_argument(
        "--models", type=Path, metavar="DIR",
        help="keep the checkpoint here, as a PersistentVolumeClaim would; uid 65532 must be able to write it",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds until it must be ready")
    options = parser.parse_args()
    if "SALVER_TRY_PODMAN" not in os.environ:  # a mount namespace of our own: the host's mounts stay
        words = [sys.executable, *sys.argv]
        script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
        environment = {**os.environ, "SALVER_TRY_PODMAN": "1", "STORAGE_DRIVER": "vfs"}
        return subprocess.call(["unshare", "-m", "sh", "-c", script, "sh", *words], env=environment)
    with tempfile.TemporaryDirectory() as directory:
        (conf := Path(directory) / "containers.conf").write_text(CONTAINERS_CONF)
        os.environ["CONTAINERS_CONF"] = str(conf)
        settings = {"port": options.port, "threads": options.threads}
        file = Path(directory) / "pod.yaml"
        file.write_text(
            yaml.safe_dump_all(manifests(options.overlay, options.image, settings, options.models))
        )
        try:
            print(podman("kube", "play", str(file)))
            return look(f"127.0.0.1:{options.port}", options.patience)
        finally:
            print(podman("kube", "down", str(file), check=False))


def look(address: str, patience: float) -> int:
    """What the clients, and the kernel, see of it."""
    salver = str(Path(sys.executable).with_name("salver"))
    begin = time.monotonic()
    wait = [salver, "health", "readiness", "--wait", str(patience), "--address", address]
    code = subprocess.call(wait)
    names = podman("ps", "--all", "--format", "{{.Names}}").split()
    container = next(name for name in names if name.endswith("-salver"))
    print(f"readiness after {time.monotonic() - begin:.1f} s; its log:")
    print(podman("logs", "--tail", "12", container))
    if code:
        return code
    pid = podman("inspect", "--format", "{{.State.Pid}}", container).strip()
    status = Path(f"/proc/{pid}/status").read_text()
    print(*(line for line in status.splitlines() if line.startswith(SHOWN)), sep="\n")
    writes = "touch /x; touch /tmp/x && echo /tmp can be written"
    print(podman("exec", container, "sh", "-c", writes, check=False))
    code = subprocess.call([
        salver, "deploy-check", address, "--grace", "40", "--metrics", "http://127.0.0.1:9090/metrics",
    ])  # fmt: skip
    tokens, seconds = stop_under_a_stream(address, container)
    print(f"stopped in {seconds:.1f} s: {podman('logs', '--tail', '2', container).strip()}")
    print(f"a stream that was under way had its {tokens} tokens of {STREAMED}")
    return code or int(tokens != STREAMED)


def stop_under_a_stream(address: str, container: str) -> tuple[int, float]:
    """SIGTERM while an answer is on its way (SIGKILL after the grace): its tokens, and seconds to the end."""
    options = ConnectionOptions(resume_attempts=0)
    with (
        Client(address, options) as client,
        client.stream_generate("Count: 1, 2, 3,", max_tokens=STREAMED, ignore_eos=True) as stream,
    ):
        next(stream)
        begin = time.monotonic()
        stop = subprocess.Popen(["podman", "stop", "--time", "40", container], stdout=subprocess.DEVNULL)
        for _ in stream:
            pass
        stop.wait()
        return len(stream.result.completions[0].token_ids), time.monotonic() - begin


if __name__ == "__main__":
    raise SystemExit(main())
