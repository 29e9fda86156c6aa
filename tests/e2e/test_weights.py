"""A running server's weights are replaced: its calls are waited for, aborted or kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from e2e.test_admin import CONTEXT, TIMEOUT, go_on
from support.checkpoints import write_tiny_llama
from support.serving import SALVER, Server
from transformers import AutoModelForCausalLM

from salver.client import Aborted, AdminClient, Client, GenerateResult, InvalidArgument, Stream

PROMPT = [50, 60, 70, 80] * 10  # more than two blocks of the cache
COUNT = 24


@dataclass
class Site:
    """A server, its --weights-root, and clients of both its ports."""

    server: Server
    root: Path
    client: Client
    admin: AdminClient
    admin_address: str

    def answer(self, prompt: list[int] = PROMPT, count: int = COUNT) -> GenerateResult:
        return self.client.generate(prompt, temperature=0, max_tokens=count, ignore_eos=True, timeout=TIMEOUT)

    def tokens(self, count: int = COUNT) -> list[int]:
        return list(self.answer(count=count).completions[0].token_ids)

    def long_stream(self) -> Stream:
        return self.client.stream_generate(
            PROMPT, temperature=0, max_tokens=CONTEXT - 100, ignore_eos=True, timeout=TIMEOUT
        )

    def write(self, name: str, seed: int) -> Path:
        return write_tiny_llama(self.root / name, seed=seed, context=CONTEXT)

    def truth(self, name: str) -> list[int]:
        """What transformers says with these weights."""
        model = AutoModelForCausalLM.from_pretrained(self.root / name, dtype=torch.float32).eval()
        ids = torch.tensor([PROMPT])
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return list(whole[0, len(PROMPT) :].tolist())


@pytest.fixture(scope="module")
def site(
    start_module_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("weights")
    checkpoint = write_tiny_llama(root / "first", context=CONTEXT)
    server = start_module_server(
        checkpoint, "--admin-port", "0", "--weights-root", str(root), "--no-deadline-admission"
    )
    address = server.wait_for_line(r"^admin on (\S+)$")
    with Client(server.address) as client, AdminClient(address) as admin:
        yield Site(server, root, client, admin, address)


def test_answers_are_the_new_weights(site: Site) -> None:
    before = site.answer()
    assert list(before.completions[0].token_ids) == site.truth("first")
    again = site.answer()
    assert again.usage is not None and again.usage.cached_tokens > 0
    directory = site.write("second", 2)
    done = site.admin.update_weights("second")
    assert done.version == before.weights_version + 1 and not done.unchanged
    after = site.answer()
    assert after.usage is not None and after.usage.cached_tokens == 0, "no key of the old weights is read"
    assert list(after.completions[0].token_ids) == site.truth("second") != site.truth("first")
    assert (after.numerics_id, after.weights_version) == (done.numerics_id, done.version)
    assert done.numerics_id != before.numerics_id
    assert done.numerics_id.partition("-")[0] == before.numerics_id.partition("-")[0]
    info = site.client.server_info()
    assert (info.numerics_id, info.weights_version) == (done.numerics_id, done.version)
    assert site.client.get_model().weights_digest == done.digest
    # What a trainer reads: the log-probabilities of tokens, as transformers has them.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    said = list(after.completions[0].token_ids)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + said])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
    scored = site.client.score([(PROMPT, said)])[0]
    found = torch.tensor([item.logprob for item in scored.logprobs])
    assert (found - expected).abs().max() < 1e-4
    same = site.admin.update_weights("second")
    assert same.unchanged and same.version == done.version


def test_calls_are_waited_for(site: Site) -> None:
    site.write("third", 3)
    before = site.tokens()
    with ThreadPoolExecutor(1) as pool, site.long_stream() as stream:
        next(stream)
        old = stream.result.weights_version
        updating = pool.submit(site.admin.update_weights, "third", timeout=TIMEOUT)
        tokens = go_on(stream, 50)
        assert not updating.done(), "it waits for the stream"
        assert tokens[:COUNT] == before and stream.result.weights_version == old
        stream.close()
        assert updating.result().version == old + 1
    assert site.tokens() == site.truth("third")


def test_calls_are_aborted(site: Site) -> None:
    site.write("fourth", 4)
    with site.long_stream() as stream:
        next(stream)
        done = site.admin.update_weights("fourth", "abort")
        assert done.num_aborted == 1
        with pytest.raises(Aborted) as ended:
            go_on(stream, CONTEXT)
        assert ended.value.reason == "WEIGHTS_UPDATED"
    assert site.tokens() == site.truth("fourth")


def test_calls_are_kept(site: Site) -> None:
    site.write("fifth", 5)
    with site.long_stream() as stream:
        next(stream)
        bits = stream.result.numerics_id
        done = site.admin.update_weights("fifth", "keep")
        assert done.num_kept == 1
        go_on(stream, 50)
        last = next(stream)
        # What began with other weights promises nothing, and says so.
        assert last.numerics_id.startswith("none-") and last.numerics_id != bits
        assert last.weights_version == done.version
        # Nobody else reads what it computes.
        assert site.tokens() == site.truth("fifth")
        answer = site.answer()
        assert (answer.numerics_id, answer.weights_version) == (done.numerics_id, done.version)


def spoiled(site: Site, change: Callable[[Path], None]) -> str:
    directory = site.root / "spoiled"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(site.root / "second", directory)
    change(directory)
    return "spoiled"


def tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def config(directory: Path, **values: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: tensors(d, lambda t: t.update({NAME: torch.zeros(5, 64)})), r"up_proj\.weight has shape"),
        (lambda d: tensors(d, lambda t: t.pop(NAME)), r"layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda d: tensors(d, lambda t: t.update(other=torch.zeros(1))), "other"),
        (lambda d: tensors(d, lambda t: t[NAME].fill_(float("nan"))), r"layers\.1\.up\.weight hold NaN"),
        (lambda d: config(d, num_hidden_layers=3), "num_layers is 3"),
        (lambda d: config(d, rms_norm_eps=0.5), "norm is NormSpec"),
        (lambda d: config(d, architectures=["GPT2LMHeadModel"]), r"config\.json"),
        (lambda d: (d / "config.json").unlink(), r"config\.json"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x"), r"model\.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
    ],
)
def test_bad_weights_change_nothing(site: Site, spoil: Callable[[Path], None], told: str) -> None:
    before = site.answer()
    name = spoiled(site, spoil)
    with pytest.raises(InvalidArgument, match=told):
        site.admin.update_weights(name)
    after = site.answer()
    assert after.numerics_id == before.numerics_id
    assert after.completions[0].token_ids == before.completions[0].token_ids


def test_the_newest_weights_come_back_after_a_crash(site: Site) -> None:
    site.write("sixth", 6)
    done = site.admin.update_weights("sixth")
    with site.long_stream() as stream:
        next(stream)
        site.server.worker.kill()
        tokens = go_on(stream, 50)
    assert tokens[:COUNT] == site.truth("sixth") == site.tokens()
    assert site.answer().weights_version == done.version


def test_the_command_line(site: Site) -> None:
    site.write("seventh", 7)
    command = [SALVER, "weights", "update", "seventh", "--in-flight", "keep", "--address", site.admin_address]
    told = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True, timeout=60).stdout
    assert json.loads(told)["version"] == site.answer().weights_version


def test_the_example_of_the_docs(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "weights.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for there, here in (
        ("127.0.0.1:50051", site.server.address), ("127.0.0.1:50052", site.admin_address),
        ("./weights", str(site.root)), ("./checkpoint", str(site.root / "seventh")),
    ):  # fmt: skip
        example = example.replace(there, here)
    exec(example, {})
    assert site.server.metric("salver_weights_version") == site.answer().weights_version
