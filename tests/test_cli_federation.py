import json
import pty
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from cryptography import x509

from peertune.cli import app
from peertune.errors import IdentityError
from peertune.identity.keys import load_ca, load_identity
from peertune.identity.membership import Membership
from peertune.identity.roster import load_roster

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ca(peertune: Call) -> Call:
    """The same, in a folder with a CA and a request of hospital-1."""
    assert peertune("ca", "init", "--federation", "hospitals")[0] == 0
    assert peertune("peer", "request", "--name", "hospital-1", "--address", "host-1:50051")[0] == 0
    return peertune


REQUEST = "peer/hospital-1.request.pem"


def members(peertune: Call) -> list[dict[str, object]]:
    code, out, _ = peertune("ca", "list", "--json")
    assert code == 0
    found = json.loads(out)["members"]
    assert isinstance(found, list)
    return found


def test_from_nothing_to_a_peer_who_is_someone(ca: Call, tmp_path: Path) -> None:
    code, out, err = ca("ca", "approve", REQUEST, "--yes", "--days", "30")
    assert (code, err) == (0, "")
    assert "adds a new member, client 0" in out
    assert "send it back, then issue a roster with peertune roster" in out
    code, out, err = ca("roster")
    assert (code, err) == (0, "")
    first, second, third, *_ = out.splitlines()
    assert (first, second[:6]) == ("roster.yaml: roster 1 of hospitals", "  CA  ")
    assert third.startswith("   0  hospital-1  host-1:50051  until ")
    roster = load_roster(Path("roster.yaml").read_bytes(), load_ca(tmp_path / "peer"))
    identity = load_identity(tmp_path / "peer", roster)
    assert (identity.name, identity.client) == ("hospital-1", 0)
    certificate = x509.load_pem_x509_certificate(identity.certificate)
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 31
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_both_ends_see_one_fingerprint(peertune: Call) -> None:
    peertune("ca", "init", "--federation", "hospitals")
    asked = json.loads(peertune("peer", "request", "--name", "a", "--json")[1])
    assert asked["address"] is None
    assert f"fingerprint  {asked['fingerprint']}\n" in peertune("ca", "approve", asked["request"])[1]
    approved = json.loads(peertune("ca", "approve", asked["request"], "--yes", "--json")[1])
    assert approved["fingerprint"] == asked["fingerprint"]
    assert members(peertune)[0]["fingerprints"] == [asked["fingerprint"]]
    issued = json.loads(peertune("roster", "--json")[1])
    assert (issued["serial"], issued["members"]) == (1, members(peertune))


def test_everybody_sees_the_fingerprint_of_the_ca_where_it_is_compared(peertune: Call) -> None:
    ca = json.loads(peertune("ca", "init", "--federation", "hospitals", "--json")[1])["fingerprint"]
    words = ("peer", "request", "--name", "a")
    assert "the CA's     not known here yet: have it read out in the same call" in peertune(*words)[1]
    assert f"the CA's     {ca}: read it out" in peertune("ca", "approve", "peer/a.request.pem", "--yes")[1]
    assert f"the CA's     {ca}\n" in peertune(*words)[1], "once its certificate is there"
    assert json.loads(peertune(*words, "--json")[1])["ca_fingerprint"] == ca
    for command in (("ca", "list"), ("roster",)):
        assert f"\n  CA  {ca}\n" in peertune(*command)[1]
        assert json.loads(peertune(*command, "--json")[1])["ca_fingerprint"] == ca
    assert f"with the fingerprint {ca}; is it the one" in peertune("peer", "doctor")[1]


def test_a_second_ca_of_the_same_name_is_found_out(ca: Call) -> None:
    ca("ca", "approve", REQUEST, "--yes")
    ca("roster", "--out", "first.yaml")
    first = json.loads(ca("ca", "list", "--json")[1])["ca_fingerprint"]
    ca("ca", "init", "--federation", "hospitals", "--dir", "second")
    assert ca("ca", "approve", REQUEST, "--yes", "--dir", "second")[0] == 0, "and puts its certificate in the peer's"
    ca("roster", "--dir", "second", "--out", "second.yaml")
    second = json.loads(ca("ca", "list", "--dir", "second", "--json")[1])["ca_fingerprint"]
    assert second != first

    def doctor(*words: str) -> dict[str, str]:
        checks = json.loads(ca("peer", "doctor", "--roster", "second.yaml", "--json", *words)[1])["checks"]
        return {check["what"]: f"{check['level']}: {check['finding']}" for check in checks if check["member"] is None}

    start = ("peer", "start", "--recipe", "digits-demo", "--out", "x", "--roster", "second.yaml")
    said = (
        f"the CA's fingerprint is {second}, and --ca-fingerprint says {first}: it is another CA of the name hospitals"
    )
    for given in (first, first.upper().replace(" ", ":"), first.replace(" ", "")):
        code, out, err = ca(*start, "--ca-fingerprint", given)
        assert (code, out) == (2, "")
        assert said in err.splitlines()[-1]
    assert not Path("peer/trusted.json").exists()
    assert doctor("--ca-fingerprint", first)["roster"].startswith(f"failed: {said}")
    assert doctor("--ca-fingerprint", second)["roster"].startswith("ok: ")
    assert not Path("peer/trusted.json").exists(), "to look at is not to trust"
    for given in ("", first[:-1], first + " 0", "x" * 64):
        code, _, err = ca(*start, "--ca-fingerprint", given)
        assert code == 2
        assert "give the 64 digits that peertune ca list shows" in err

    ca("ca", "approve", REQUEST, "--yes")
    Membership(Path("peer"), Path("first.yaml"), first)
    ca("ca", "approve", REQUEST, "--yes", "--dir", "second")
    with pytest.raises(
        IdentityError, match=f"^second.yaml: is of the CA with the fingerprint {second}, and this peer "
    ):
        Membership(Path("peer"), Path("second.yaml"))


def test_a_ca_that_was_restored_issues_rosters_above_those_of_before(ca: Call) -> None:
    ca("ca", "approve", REQUEST, "--yes")
    path = ("--recipe", "digits-demo", "clients=2", "graph={name: path}")
    for words, serial in ((["--serial-above", "7"], 8), ([], 9), ([*path, "--serial-above", "11"], 12), ([], 13)):
        assert json.loads(ca("roster", *words, "--json")[1])["serial"] == serial
    assert json.loads(ca("roster", "--serial-above", "3", "--json")[1])["serial"] == 14, "never below its own"


def test_renewing_calls_out_what_changes_and_re_issues_nobody_else_s(ca: Call) -> None:
    ca("ca", "approve", REQUEST, "--yes")
    ca("peer", "request", "--name", "hospital-2", "--dir", "two")
    ca("ca", "approve", "two/hospital-2.request.pem", "--yes", "--out", "two.pem")
    assert Path("two.pem").exists()
    ca("roster")
    before = yaml.safe_load(Path("roster.yaml").read_text())["peers"]

    assert "renews hospital-1, client 0, with the same key\n" in ca("ca", "approve", REQUEST, "--yes")[1]
    first = json.loads(ca("peer", "request", "--name", "hospital-1", "--address", "host-9:1", "--json")[1])
    assert first["renews"]
    out = ca("ca", "approve", REQUEST, "--yes")[1]
    assert (
        f"WITH A NEW KEY, which replaces {before[0]['fingerprints'][0]}; its ADDRESS CHANGES from host-1:50051" in out
    )
    ca("roster")
    after = yaml.safe_load(Path("roster.yaml").read_text())["peers"]
    assert after[1] == before[1]
    assert (after[0]["client"], len(after[0]["certificates"]), len(after[0]["fingerprints"])) == (0, 3, 2)


def test_who_is_revoked_is_out_of_the_next_roster_and_comes_back_with_another_key_only(ca: Call) -> None:
    ca("ca", "approve", REQUEST, "--yes")
    code, out, _ = ca("ca", "revoke", "hospital-1")
    assert code == 0
    assert "revoked hospital-1; make it known" in out
    assert "0  hospital-1  dials out  revoked" in ca("ca", "list")[1]
    ca("roster")
    assert yaml.safe_load(Path("roster.yaml").read_text())["peers"][0]["certificates"] == []
    assert ca("ca", "approve", REQUEST, "--yes")[0] == 2
    ca("peer", "request", "--name", "hospital-1")
    assert "puts back hospital-1, client 0, who was revoked" in ca("ca", "approve", REQUEST, "--yes")[1]
    assert [member["client"] for member in members(ca)] == [0]


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_approval_is_asked_for(ca: Call, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    keyboard, terminal = pty.openpty()
    with open(terminal) as stdin, open(keyboard, "wb", buffering=0) as typing:
        monkeypatch.setattr(sys, "stdin", stdin)
        typing.write(f"{answer}\n".encode())
        found, _, err = ca("ca", "approve", REQUEST)
    assert found == code
    assert "is the fingerprint the sender's?" in err
    assert ("not approved; nothing was written" in err) == (code == 2)
    assert len(members(ca)) == (code == 0)
    assert Path("peer/hospital-1.certificate.pem").exists() == (code == 0)


def test_without_a_terminal_nothing_is_approved_unasked(ca: Call) -> None:
    code, _, err = ca("ca", "approve", REQUEST)
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no terminal to ask on; compare the fingerprint, then give --yes" in err
    assert members(ca) == []


MISTAKES = {
    "init twice": (["ca", "init", "--federation", "x"], "ca: is there already; give another --dir"),
    "federation": (["ca", "init", "--federation", "A B", "--dir", "c"], "federation 'A B': give lower-case"),
    "no CA": (["ca", "list", "--dir", "none"], "none: no CA; make one with peertune ca init"),
    "no CA for a roster": (["roster", "--dir", "none"], "none: no CA"),
    "no such request": (["ca", "approve", "none.pem", "--yes"], "none.pem: can't be read (No such file"),
    "no request": (["ca", "approve", "ca/certificate.pem", "--yes"], "ca/certificate.pem: is no signing request"),
    "days": (["ca", "approve", REQUEST, "--yes", "--days", "0"], "days 0: give 1 to 366"),
    "no room": (["ca", "approve", REQUEST, "--yes", "--out", "none/c.pem"], "none/c.pem: can't be written"),
    "no member": (["ca", "revoke", "hospital-1"], "member: unknown name 'hospital-1'"),
    "name": (["peer", "request", "--name", "Hospital"], "name 'Hospital': give lower-case letters"),
    "address": (["peer", "request", "--name", "a", "--address", "host"], "address 'host': give host:port"),
    "another's folder": (["peer", "request", "--name", "a"], "peer: is hospital-1's; give a another --dir"),
    "a file's place": (["peer", "request", "--name", "a", "--dir", REQUEST], f"{REQUEST}: can't be written"),
    "overrides alone": (["roster", "seed=1"], "roster: seed=1 goes with --recipe"),
    "no such recipe": (["roster", "--recipe", "none.yaml"], "none.yaml: "),
    "no place for a roster": (["roster", "--out", "none/roster.yaml"], "none/roster.yaml: can't be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(ca: Call, tmp_path: Path, mistake: str) -> None:
    words, said = MISTAKES[mistake]
    code, _, err = ca(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"peertune: {said}")
    assert len(list(tmp_path.rglob("*key*.pem"))) == 2, "a mistake makes no key"


def test_a_ca_key_that_others_may_read_is_refused(ca: Call) -> None:
    assert stat.S_IMODE(Path("ca/key.pem").stat().st_mode) == 0o600
    Path("ca/key.pem").chmod(0o644)
    assert ca("roster")[2] == "peertune: ca/key.pem: others may read this key; run chmod 600 ca/key.pem\n"
    assert not Path("roster.yaml").exists()


@pytest.mark.thorough
def test_each_member_gets_a_roster_of_its_own_for_a_recipe(ca: Call) -> None:
    for number in (1, 2, 3):
        name = f"hospital-{number}"
        if number > 1:
            ca("peer", "request", "--name", name, "--dir", name)
        assert ca("ca", "approve", f"{'peer' if number == 1 else name}/{name}.request.pem", "--yes")[0] == 0
    ring = ["clients=100000", "graph={name: ring}"]
    code, out, err = ca("roster", "--recipe", "digits-demo", *ring)
    assert (code, err) == (0, "")
    assert out.startswith("rosters: each member's own roster 1 of hospitals\n  CA  ")
    assert {file.name for file in Path("rosters").iterdir()} == {
        f"hospital-{number}.roster.yaml" for number in (1, 2, 3)
    }
    assert ca("ca", "revoke", "hospital-3")[0] == 0
    said = json.loads(ca("roster", "--recipe", "digits-demo", *ring, "--json")[1])
    assert (said["rosters"], said["serial"], len(said["members"])) == ("rosters", 2, 3)
    assert {file.name for file in Path("rosters").iterdir()} == {"hospital-1.roster.yaml", "hospital-2.roster.yaml"}
    roster = load_roster(Path("rosters/hospital-1.roster.yaml").read_bytes(), load_ca(Path("peer")))
    assert [member.name for member in roster.members] == ["hospital-1", "hospital-2"]
    assert roster.own is not None
    assert roster.own.known.edges[0].tolist() == [[0, 1], [0, 99_999], [1, 2], [99_998, 99_999]]
    (Path("rosters") / "notes.txt").write_text("mine")
    Path("folders", "mine.roster.yaml").mkdir(parents=True)
    dense = ["clients=7000", "graph={name: bipartite, left: 100}", "--out", "x"]
    for words, mistake in (
        (ring, "rosters: holds something other than rosters; give another --out"),
        ([*ring, "--out", "peer"], "peer: holds something other than rosters"),
        (
            [*ring, "--out", "rosters/hospital-1.roster.yaml"],
            "rosters/hospital-1.roster.yaml: holds something other than rosters",
        ),
        (["clients=2", "graph={name: path}", "--out", "x"], "clients: 2, but the roster has 3 members; give as many"),
        (
            ["graph={name: complete}", "--out", "x"],
            "graph complete: any two clients may meet, so each must know of all",
        ),
        (["graph={name: rong}", "--out", "x"], "graph.name: unknown name 'rong'"),
        (dense, "roster: what client 0 must know of graph bipartite takes more than 4 MiB; choose a sparser graph"),
        ([*ring, "--out", "."], ".: holds something other than rosters"),
        ([*ring, "--out", "folders"], "folders: holds something other than rosters"),
    ):
        code, out, err = ca("roster", "--recipe", "digits-demo", *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"peertune: {mistake}")
    assert not Path("x").exists()
    assert (Path("rosters") / "notes.txt").read_text() == "mine"
    assert json.loads(ca("roster", "--json")[1])["serial"] == 3, "a mistake spends no serial"
    Path("real").mkdir()
    Path("link").symlink_to("real")
    assert ca("roster", "--recipe", "digits-demo", *ring, "--out", "link")[0] == 0
    assert Path("link").is_symlink()
    assert sorted(file.name for file in Path("real").iterdir()) == ["hospital-1.roster.yaml", "hospital-2.roster.yaml"]


@pytest.mark.parametrize("group", ["ca", "peer", "roster"])
def test_help_shows_examples_and_says_what_each_option_does(peertune: Call, group: str) -> None:
    command = typer.main.get_command(app).commands[group]  # type: ignore[attr-defined]
    ways = [[group, name] for name in getattr(command, "commands", {})] or [[group]]
    for words in ([group], *ways):
        code, out, _ = peertune(*words, "--help")
        assert code == 0
        assert "Example" in out
    for words in ways:
        found = command.commands[words[1]] if len(words) > 1 else command
        assert all(param.help for param in found.params)


def test_a_certificate_is_renewed_for_the_key_that_is_there_and_needs_nothing_of_the_member(
    ca: Call, tmp_path: Path
) -> None:
    ca("ca", "approve", REQUEST, "--yes", "--days", "5")
    (before,) = members(ca)
    code, out, _ = ca("ca", "renew", "hospital-1", "--days", "60")
    assert code == 0
    assert out.startswith("renewed hospital-1 until ")
    (after,) = members(ca)
    assert after["fingerprints"] == before["fingerprints"]
    assert str(after["valid_until"]) > str(before["valid_until"])
    ca("roster")
    roster = load_roster((tmp_path / "roster.yaml").read_bytes(), load_ca(tmp_path / "peer"))
    identity = load_identity(tmp_path / "peer", roster)
    assert x509.load_pem_x509_certificate(identity.certificate).not_valid_after_utc.isoformat() == after["valid_until"]


def test_who_is_no_member_or_revoked_is_not_renewed(ca: Call) -> None:
    ca("ca", "approve", REQUEST, "--yes")
    code, _, err = ca("ca", "renew", "hospital-7")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean hospital-1" in err
    ca("ca", "revoke", "hospital-1")
    code, _, err = ca("ca", "renew", "hospital-1")
    assert (code, err.count("\n")) == (2, 1)
    assert "hospital-1: is revoked already" in err
