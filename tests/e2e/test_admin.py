"""What a running server serves is changed: adapters come, are replaced and go, under load and crashes."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from parity.test_adapters import LENGTH, LLAMA, NAME, PROMPTS, of_peft, with_tensor, write_adapter
from support.checkpoints import write_tiny_llama
from support.serving import SALVER, Server, wait_until

from salver.client import (
    Aborted,
    AdminClient,
    Client,
    ConnectionOptions,
    InvalidArgument,
    NotFound,
    Stream,
    Unauthenticated,
)

CONTEXT = 8192  # a stream of it lasts for seconds
TIMEOUT = 120.0


@dataclass
class Site:
    """A server, its directories, and clients of both its ports."""

    server: Server
    checkpoint: Path
    root: Path
    client: Client
    admin: AdminClient
    admin_address: str

    def tokens(self, prompt: list[int], model: str = "", count: int = LENGTH) -> list[int]:
        result = self.client.generate(
            prompt, model=model, temperature=0, max_tokens=count, ignore_eos=True, timeout=TIMEOUT
        )
        return list(result.completions[0].token_ids)

    @contextmanager
    def long_stream(self, model: str = "") -> Iterator[Stream]:
        """One that has begun, and goes on for thousands of tokens."""
        with self.client.stream_generate(
            PROMPTS[0], model=model, temperature=0, max_tokens=CONTEXT - 10, ignore_eos=True, timeout=TIMEOUT
        ) as stream:
            next(stream)
            yield stream

    def write(self, directory: str, seed: int, **config: object) -> Path:
        config = {"r": 4, "lora_alpha": 16, "target_modules": LLAMA, **config}
        return write_adapter(self.checkpoint, self.root / directory, seed, **config)


def so_far(stream: Stream) -> list[int]:
    return list(stream.result.completions[0].token_ids)


def go_on(stream: Stream, count: int) -> list[int]:
    """Its tokens, once they are so many more."""
    wanted = len(so_far(stream)) + count
    while len(so_far(stream)) < wanted:
        next(stream)
    return so_far(stream)


@pytest.fixture(scope="module")
def site(
    start_module_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    base = tmp_path_factory.mktemp("admin")
    checkpoint, root = write_tiny_llama(base / "tiny", context=CONTEXT), base / "adapters"
    root.mkdir()
    tokens = base / "tokens.toml"
    tokens.write_text(f'[[tokens]]\nsha256 = "{sha256(b"open-sesame").hexdigest()}"\ntenant = "trainer"\n')
    server = start_module_server(
        checkpoint, "--admin-port", "0", "--admin-token-file", str(tokens), "--adapter-root", str(root),
        "--no-deadline-admission",
    )  # fmt: skip
    address = server.wait_for_line(r"^admin on (\S+)$")
    options = ConnectionOptions(token="open-sesame")
    with Client(server.address) as client, AdminClient(address, options) as admin:
        yield Site(server, checkpoint, root, client, admin, address)


def test_a_replacement_under_load(site: Site) -> None:
    truth = {seed: of_peft(site.checkpoint, site.write(f"seed{seed}", seed)) for seed in (1, 2)}
    base = of_peft(site.checkpoint, None)
    assert len({str(tokens) for tokens in (base, *truth.values())}) == 3
    first = site.admin.load_adapter("polite", "seed1")
    assert (first.adapter.rank, first.replaced_version, first.unchanged) == (4, None, False)
    done = threading.Event()
    with ThreadPoolExecutor(3) as pool, site.long_stream("polite") as stream:

        def ask_the_base() -> int:
            count = 0
            while not (count and done.is_set()):
                assert site.tokens(PROMPTS[count % 3]) == base[count % 3]
                count += 1
            return count

        load = [pool.submit(ask_the_base) for _ in range(3)]
        try:
            assert [site.tokens(prompt, "polite") for prompt in PROMPTS] == truth[1]
            second = site.admin.load_adapter("polite", "seed2")
            assert second.replaced_version == first.adapter.version
            found = {a.version: a for a in site.admin.list_adapters()}
            old = found[first.adapter.version]
            assert old.retired and old.num_running == 1
            assert [site.tokens(prompt, "polite") for prompt in PROMPTS] == truth[2]
            tokens = go_on(stream, 50)
            site.admin.load_adapter("same", "seed1")
            assert site.tokens(PROMPTS[0], "same", len(tokens)) == tokens, (
                "as a stream that nothing disturbed"
            )
        finally:
            done.set()
        assert all(future.result() for future in load)
    wait_until("the old version is freed", lambda: not any(a.retired for a in site.admin.list_adapters()))
    assert {model.name for model in site.client.list_models()} == {site.server.name, "polite", "same"}
    site.admin.unload_adapter("same")


def test_a_bad_adapter_changes_nothing(site: Site) -> None:
    site.write("good", 3, target_modules=["q_proj"])
    site.admin.load_adapter("mine", "good")
    expected = site.tokens(PROMPTS[1], "mine")
    bad = site.write("bad", 4, target_modules=["q_proj"])
    with_tensor(bad, lambda tensors: tensors[NAME].fill_(float("nan")))
    with pytest.raises(InvalidArgument, match=r"bad/adapter_model.safetensors: tensor .*q_proj.lora_A.* NaN"):
        site.admin.load_adapter("mine", "bad")
    with_tensor(bad, lambda tensors: tensors.update({NAME: torch.zeros(4, 5)}))
    with pytest.raises(InvalidArgument, match=r"q_proj\.lora_A\.weight has shape"):
        site.admin.load_adapter("mine", "bad")
    with pytest.raises(InvalidArgument, match="directory"):
        site.admin.load_adapter("mine", "..")
    assert site.tokens(PROMPTS[1], "mine") == expected
    site.admin.unload_adapter("mine")


def test_an_unload_waits_or_aborts(site: Site) -> None:
    site.write("gone", 5)
    with ThreadPoolExecutor(1) as pool:
        for abort in (False, True):
            site.admin.load_adapter("gone")
            with site.long_stream("gone") as stream:
                mode = "abort" if abort else "wait"
                unloading = pool.submit(site.admin.unload_adapter, "gone", mode, timeout=TIMEOUT)
                wait_until("it is retired", lambda: all(a.retired for a in site.admin.list_adapters()
                                                        if a.name == "gone"))  # fmt: skip
                with pytest.raises(NotFound):
                    site.tokens(PROMPTS[0], "gone")
                if abort:
                    with pytest.raises(Aborted) as ended:
                        go_on(stream, CONTEXT)
                    assert ended.value.reason == "ADAPTER_UNLOADED"
                else:
                    go_on(stream, 20)
                    assert not unloading.done(), "it waits"
            assert unloading.result().num_aborted == int(abort)
    assert "gone" not in {a.name for a in site.admin.list_adapters()}


def test_who_has_no_token_changes_nothing(site: Site) -> None:
    wrong = ConnectionOptions(token="wrong")
    with AdminClient(site.admin_address, wrong) as stranger, pytest.raises(Unauthenticated):
        stranger.list_adapters()
    command = [SALVER, "adapters", "list", "--address", site.admin_address, "--json"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "UNAUTHENTICATED" in refused.stderr
    token = {"SALVER_TOKEN": "open-sesame", "PATH": ""}
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=token).stdout
    assert {item["name"] for item in json.loads(told)} == {a.name for a in site.admin.list_adapters()}
    site.write("typed", 6)
    for words in (["load", "typed"], ["unload", "typed", "--abort"]):
        done = subprocess.run(
            [*command[:2], *words, *command[3:]],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
            env=token,
        )
        assert json.loads(done.stdout)["adapter"]["name"] == "typed"
    assert "caller=trainer" in site.server.log and "code=UNAUTHENTICATED" in site.server.log
    assert "open-sesame" not in site.server.log


def test_the_example_of_the_docs(site: Site) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
    _, example = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    site.write("polite-2", 9)
    here = f'"{site.admin_address}", ConnectionOptions(token="open-sesame")'
    exec(example.replace('"127.0.0.1:50052"', here), {"ConnectionOptions": ConnectionOptions})
    assert "polite" not in {model.name for model in site.client.list_models()}


def test_adapters_come_back_after_a_crash(site: Site) -> None:
    directory = site.write("kept", 7)
    site.admin.load_adapter("kept")
    changing = site.write("changing", 8)
    site.admin.load_adapter("changing")
    expected = [site.tokens(prompt, "kept") for prompt in PROMPTS]
    assert expected == of_peft(site.checkpoint, directory)
    changing.rename(site.root / "elsewhere")
    with site.long_stream("kept") as stream:
        before = len(so_far(stream))
        site.server.worker.kill()
        tokens = go_on(stream, 50)
        assert len(tokens) > before
    assert [site.tokens(prompt, "kept") for prompt in PROMPTS] == expected
    assert site.tokens(PROMPTS[0], "kept", len(tokens)) == tokens
    with pytest.raises(NotFound):  # its files are not there any more
        site.tokens(PROMPTS[0], "changing")
    wait_until("the log says so", lambda: "adapter lost" in site.server.log)
    site.admin.load_adapter("changing", "elsewhere")
    assert site.tokens(PROMPTS[0], "changing")
