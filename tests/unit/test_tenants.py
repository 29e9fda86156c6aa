"""The file of tokens: what it may say, what it refuses without quoting it, and how it is replaced."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from support.certificates import token_file

from salver.server.cli import token as token_command
from salver.server.reloading import CHECK_SECONDS, BadFile
from salver.server.tenants import Allowance, Tenants, UnknownToken

DIGEST = sha256(b"secret").hexdigest()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_tokens_and_tenants(tmp_path: Path) -> None:
    more = (
        '[[tokens]]\nsha256 = "' + DIGEST.upper() + '"\ntenant = "b"\nexpires = 2030-01-01T00:00:00Z\n'
        '[tenants.b]\nweight = 2\ntokens_per_second = 10\nservices = ["GenerationService", "other.v1.S"]\n'
    )
    now = Clock()
    tenants = Tenants(token_file(tmp_path / "t", ("one", "a"), ("two", "a"), more=more), now=now)
    assert tenants.of_token("one") == tenants.of_token("two")
    a, b = tenants.of_token("one"), tenants.of_token("secret")
    assert (a.name, a.weight, a.may_call("/salver.v1.ModelService/GetModel")) == ("a", 1.0, True)
    assert (b.name, b.weight) == ("b", 2.0)
    assert b.may_call("/salver.v1.GenerationService/Chat") and b.may_call("/other.v1.S/M")
    assert not b.may_call("/salver.v1.TokenizationService/Tokenize")
    for unknown in ("", "three", DIGEST, "one "):
        with pytest.raises(UnknownToken, match="not known"):
            tenants.of_token(unknown)
    now.now = 1893456000.0  # 2030 has come
    with pytest.raises(UnknownToken, match="expired"):
        tenants.of_token("secret")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no token"),
        ("tokens = 3", "must be"),
        ("[token]", "unknown key 'token'"),
        ("[[tokens]]\nsha256 = 'hunter2'\ntenant = 'a'", "64 hexadecimal"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'", "tenant must be"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a b'", "tenant must be"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\ntoken = 'hunter2'", "must have sha256"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\n" * 2, "token 2: stands there twice"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\nexpires = 2030-01-01", "with its zone"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\n[tenants.b]\nweight = 1", "'b' has no token"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\n[tenants.a]\nweight = 0", "weight must be"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\n[tenants.a]\nburst_tokens = 9", "does nothing"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\n[tenants.a]\nservices = []", "services must be"),
        (f"[[tokens]]\nsha256 = '{DIGEST}'\ntenant = 'a'\n[tenants.a]\nwait = 1", "may have"),
        ("hunter2", "is not TOML"),
    ],
)
def test_what_a_file_must_not_say(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(text)
    with pytest.raises(BadFile, match=complaint) as error:
        Tenants(file)
    assert str(file) in str(error.value) and "hunter2" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"--tokens .*none: cannot be read: No such file"):
        Tenants(tmp_path / "none")


def test_tokens_are_replaced_while_they_are_used(tmp_path: Path) -> None:
    file, clock, told = tmp_path / "tokens.toml", Clock(), []
    limit = "[tenants.a]\ntokens_per_second = 1\nburst_tokens = 5\n"
    tenants = Tenants(
        token_file(file, ("old", "a"), more=limit), lambda what, good: told.append((what, good)), clock=clock
    )
    tenants.of_token("old").allowance.take(25)
    token_file(file, ("new", "a"), more=limit)
    tenants.of_token("old")  # looked at once a second
    clock.now += CHECK_SECONDS
    assert tenants.of_token("new").allowance.wait() == pytest.approx(19)  # what was used stays used
    with pytest.raises(UnknownToken):
        tenants.of_token("old")
    file.write_text("[[tokens]]\nsha256 = 'half a file")
    clock.now += CHECK_SECONDS
    assert tenants.of_token("new").name == "a"
    file.unlink()
    clock.now += CHECK_SECONDS
    assert tenants.of_token("new").name == "a"
    token_file(file, ("newer", "a"))
    clock.now += CHECK_SECONDS
    assert tenants.of_token("newer").allowance.wait() == 0  # no bound any more
    assert told == [("tokens", True), ("tokens", False), ("tokens", False), ("tokens", True)]


def test_an_allowance_is_paid_afterwards() -> None:
    clock = Clock()
    allowance = Allowance(clock)
    allowance.take(10**9)
    assert allowance.wait() == 0  # no bound was set
    allowance.set(10.0, 100.0)
    allowance.take(150)
    assert allowance.wait() == 5
    clock.now += 4
    assert allowance.wait() == 1
    clock.now += 1000
    allowance.take(100)
    assert allowance.wait() == 0  # the burst, and no more
    allowance.take(1)
    assert allowance.wait() == pytest.approx(0.1)


def test_salver_token_makes_an_entry_that_admits_its_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert token_command(["search"]) == 0
    token, _, entry = capsys.readouterr().out.partition("\n\n")
    (tmp_path / "t").write_text(entry)
    assert Tenants(tmp_path / "t").of_token(token).name == "search"
    assert len(token) > 40 and token not in entry
