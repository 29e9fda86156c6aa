"""LoRA adapters of a server: asked by name, beside the base, and refused where they cannot be."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from parity.test_adapters import LENGTH, LLAMA, PROMPTS, of_peft, write_adapter
from support.serving import SALVER, Server

from salver.client import Client, FailedPrecondition, NotFound


def test_adapters_are_asked_by_name(
    start_server: Callable[..., Server], tiny_llama: Path, tmp_path: Path
) -> None:
    paths: dict[str, Path | None] = {"": None}
    for seed, name in enumerate(("polite", "rude")):
        paths[name] = write_adapter(
            tiny_llama, tmp_path / name, seed, r=4, lora_alpha=16, target_modules=LLAMA
        )
    flag = ",".join(f"{name}={path}" for name, path in paths.items() if name)
    server = start_server(tiny_llama, "--adapter", flag, "--dtype", "float32")
    truth = {name: of_peft(tiny_llama, path) for name, path in paths.items()}
    asked = [(name, i) for i in range(len(PROMPTS)) for name in paths]
    with Client(server.address) as client, ThreadPoolExecutor(len(asked)) as pool:

        def answer(item: tuple[str, int]) -> list[int]:
            name, i = item
            result = client.generate(
                PROMPTS[i], model=name, temperature=0, max_tokens=LENGTH, ignore_eos=True
            )
            assert result.model == (name or server.name)
            return list(result.completions[0].token_ids)

        assert list(pool.map(answer, asked)) == [truth[name][i] for name, i in asked]
        scores = {name: client.score([(PROMPTS[0], [5, 6])], model=name)[0].sum for name in paths}
        assert len(set(scores.values())) == 3
        models = {model.name: model for model in client.list_models()}
        assert set(models) == {server.name, "polite", "rude"}
        assert models["polite"].base == server.name and not models[server.name].base
        with pytest.raises(NotFound):
            client.generate("x", model="quiet", max_tokens=1)
        page = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
        example, _ = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        exec(example.replace("127.0.0.1:50051", server.address), {})
        command = [
            SALVER,
            "generate",
            "x",
            "--address",
            server.address,
            "--model",
            "rude",
            "--max-tokens",
            "4",
        ]
        told = subprocess.run([*command, "--json"], check=True, capture_output=True, timeout=60).stdout
        assert json.loads(told)["model"] == "rude"
        with client.stream_generate("x", model="rude", max_tokens=4, temperature=0) as stream:
            next(stream)
            resume = replace(stream.resume())
        with pytest.raises(FailedPrecondition):
            client.generate("x", model="polite", max_tokens=4, temperature=0, resume=resume)


def test_a_bad_adapter_stops_the_start_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    server = Server(str(tiny_llama), "--adapter", f"polite={tmp_path}")
    try:
        assert server.process.wait(timeout=60) != 0
        assert "--adapter polite" in server.log
    finally:
        server.kill()
