"""The commands that say who is who in a federation: `ca …`, `peer request` and `roster`."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peertune.cli.common import AsJson, Overrides, Plugins, messages, print_json, progress
from peertune.errors import IdentityError

if TYPE_CHECKING:
    from peertune.identity.authority import Authority
    from peertune.identity.certificates import Request
    from peertune.identity.entries import Member

ca_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Decide who is a member of a federation: on one machine, which need not be on a network.

    Example:

      peertune ca init --federation hospitals
    """,
)
peer_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Take part in a federation, as one of its peers.

    Example:

      peertune peer request --name hospital-3 --address hospital-3.example.org:50051
    """,
)

_OWN = ".roster.yaml"  # how the files of members' own rosters end

Authorities = Annotated[Path, typer.Option("--dir", help="The CA's folder.")]


@ca_app.command()
def init(
    federation: Annotated[str, typer.Option(help="The federation's name: lower-case letters, digits, hyphens.")],
    folder: Authorities = Path("ca"),
    as_json: AsJson = False,
) -> None:
    """Make a federation's CA: the key that approves its members. It stays in this folder; keep a copy of it safe.

    Example:

      peertune ca init --federation hospitals
    """
    from peertune.identity.authority import create_authority

    made = create_authority(folder, federation)
    until = made.certificate.not_valid_after_utc
    if as_json:
        print_json({"federation": federation, "fingerprint": made.fingerprint, "valid_until": until.isoformat()})
        return
    print(f"federation   {federation}")
    print(f"CA           {folder}, until {until:%Y-%m-%d}; keep {folder / 'key.pem'} off networks")
    print(f"fingerprint  {made.fingerprint}")


@ca_app.command()
def approve(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="The signing request that a peer sent.")],
    folder: Authorities = Path("ca"),
    days: Annotated[int, typer.Option(help="How long the certificate is valid.")] = 90,
    out: Annotated[
        Path | None, typer.Option(help="The certificate's file; NAME.certificate.pem beside the request if not given.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask; the fingerprint was compared before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the sender of a request a member, or renew its certificate. Compare the fingerprint by telephone first.

    Older certificates of the same name stay valid until they expire or are revoked.

    Example:

      peertune ca approve hospital-3.request.pem --days 30
    """
    from peertune.files import write_file
    from peertune.identity import authority as ca
    from peertune.identity.certificates import bundle, fingerprint, read_request
    from peertune.identity.keys import read_small

    asked = read_request(read_small(request), request)
    printed = fingerprint(asked.key)
    file = out or request.with_name(f"{asked.name}.certificate.pem")
    with ca.opened(folder) as before:
        after, certificate = ca.approve(before, asked, days)
        where = sys.stderr if as_json else sys.stdout
        print(f"name         {asked.name}", file=where)
        print(f"address      {asked.address or 'none: it can only dial out'}", file=where)
        print(f"fingerprint  {printed}", file=where)
        print(f"the CA's     {before.fingerprint}: read it out in the same call", file=where)
        print(f"this         {_what_approval_does(before, asked)}", file=where, flush=True)
        if not yes:
            _confirm(f"make it a member of {before.federation} for {days} days, is the fingerprint the sender's?")
        ca.keep(folder, after)
        write_file(file, bundle(certificate, after.certificate))
    member = after.by_name(asked.name)
    assert member is not None
    until = certificate.not_valid_after_utc
    if as_json:
        made = {"fingerprint": printed, "valid_until": until.isoformat(), "certificate": str(file)}
        made["ca_fingerprint"] = after.fingerprint
        print_json({"client": member.client, "name": asked.name, "address": asked.address, **made})
        return
    print(f"certificate  {file}, until {until:%Y-%m-%d}: send it back, then issue a roster with peertune roster")


def _what_approval_does(authority: "Authority", request: "Request") -> str:
    """Say in a line what approving a request changes."""
    from peertune.identity.certificates import fingerprint

    member = authority.by_name(request.name)
    if member is None:
        return f"adds a new member, client {len(authority.members)}"
    who = f"{member.name}, client {member.client}"
    if not member.certificates:
        return f"puts back {who}, who was revoked, WITH ANOTHER KEY"
    moved = "" if member.address == request.address else f"; its ADDRESS CHANGES from {member.address or 'none'}"
    if fingerprint(request.key) in member.fingerprints:
        return f"renews {who}, with the same key{moved}"
    return f"renews {who}, WITH A NEW KEY, which replaces {member.fingerprints[-1]}{moved}"


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise IdentityError("ca approve: there is no terminal to ask on; compare the fingerprint, then give --yes")
    if not typer.confirm(question, err=True):
        raise IdentityError("ca approve: not approved; nothing was written")


@ca_app.command()
def renew(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member's name.")],
    folder: Authorities = Path("ca"),
    days: Annotated[int, typer.Option(help="How long the new certificate is valid.")] = 90,
) -> None:
    """Renew a member's certificate for the key that it has. It takes it up with the next roster, while it runs.

    For a new key the member makes a new request, which `ca approve` takes.

    Example:

      peertune ca renew hospital-3
    """
    from peertune.identity import authority as ca

    with ca.opened(folder) as before:
        after, certificate = ca.renew(before, name, days)
        ca.keep(folder, after)
    until = certificate.not_valid_after_utc
    print(f"renewed {name} until {until:%Y-%m-%d}: issue a roster with peertune roster, and hand it to any peer")


@ca_app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The member's name.")],
    folder: Authorities = Path("ca"),
) -> None:
    """Take a member's certificates away: peers refuse it once they have the next roster.

    Its client number stays its own. Approving a request of that name with another key puts it back.

    Example:

      peertune ca revoke hospital-3
    """
    from peertune.identity import authority as ca

    with ca.opened(folder) as before:
        ca.keep(folder, ca.revoke(before, name))
    print(f"revoked {name}; make it known: issue rosters with peertune roster, as before, and hand them to the peers")


@ca_app.command("list")
def list_members(folder: Authorities = Path("ca"), as_json: AsJson = False) -> None:
    """List the members, with the fingerprints of their keys and how long they are valid.

    Example:

      peertune ca list
    """
    from peertune.identity import authority as ca

    with ca.opened(folder) as authority:
        pass
    if as_json:
        print_json(_listed(authority))
        return
    print(f"{authority.federation}, roster {authority.serial}" if authority.serial else authority.federation)
    _print_members(authority)


def _listed(authority: "Authority") -> dict[str, Any]:
    return {
        "federation": authority.federation,
        "ca_fingerprint": authority.fingerprint,
        "serial": authority.serial,
        "members": [_facts(member) for member in authority.members],
    }


def _facts(member: "Member") -> dict[str, Any]:
    until = max((certificate.not_valid_after_utc for certificate in member.certificates), default=None)
    return {
        "client": member.client,
        "name": member.name,
        "address": member.address,
        "fingerprints": list(member.fingerprints),
        "valid_until": until and until.isoformat(),
    }


def _print_members(authority: "Authority") -> None:
    print(f"  CA  {authority.fingerprint}")
    now = datetime.now(UTC)
    for facts in map(_facts, authority.members):
        date = facts["valid_until"]
        until = f"{'until' if datetime.fromisoformat(date) > now else 'EXPIRED'} {date[:10]}" if date else "revoked"
        print(f"{facts['client']:4}  {facts['name']}  {facts['address'] or 'dials out'}  {until}")
        for printed in facts["fingerprints"]:
            print(f"      {printed}")


def roster(
    overrides: Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Give each member a roster of its own, for this recipe's graph: a path, or a name."),
    ] = None,
    folder: Authorities = Path("ca"),
    out: Annotated[
        Path | None,
        typer.Option(help="The roster's file, or with --recipe the folder.  [default: roster.yaml, or rosters]"),
    ] = None,
    above: Annotated[
        int,
        typer.Option("--serial-above", min=0, help="Of a CA restored from a copy: the highest serial that a peer has."),
    ] = 0,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Issue the roster: all members with their certificates, signed by the CA. Hand it to every peer.

    The one with the highest serial counts. Issue another after each approval and revocation. A CA that was restored
    from a copy has forgotten serials that it used: look for the highest with peer status, and give it.

    With --recipe each member that isn't revoked gets a roster of its own, NAME.roster.yaml in a folder, whose older
    rosters are removed. It lists those alone whom the member may meet on the recipe's graph, and what it must know of
    the graph: a peer's work then doesn't grow with the federation, and nobody else gets in. Peers don't pass such
    rosters on: hand each its new one.

    Examples:

      peertune roster --out roster.yaml

      peertune roster --recipe recipe.yaml --out rosters

      peertune roster --serial-above 12
    """
    from peertune.files import write_file
    from peertune.identity import authority as ca

    if recipe is not None:
        _own_rosters(recipe, overrides or [], folder, out or Path("rosters"), above, as_json)
        return
    if overrides:
        raise IdentityError(f"roster: {overrides[0]} goes with --recipe")
    out = out or Path("roster.yaml")
    with ca.opened(folder) as before:
        after, data = ca.issue_roster(before, above=above)
        ca.keep(folder, after)  # first: no two rosters may have one serial
        write_file(out, data)
    _print_roster(after, "roster", "roster", out, as_json)


def _print_roster(authority: "Authority", key: str, what: str, out: Path, as_json: bool) -> None:
    """Say what was issued: in JSON its place is under this key, else it is called so."""
    if as_json:
        print_json({key: str(out), **_listed(authority)})
        return
    print(f"{out}: {what} {authority.serial} of {authority.federation}")
    _print_members(authority)


def _own_rosters(recipe: str, overrides: list[str], folder: Path, out: Path, above: int, as_json: bool) -> None:
    """Issue to each member its own roster, all in a folder, which takes the place of those of before."""
    from peertune.assembly.registry import build_graph, graph_settings
    from peertune.files import write_file, written_folder
    from peertune.identity import authority as ca
    from peertune.identity.entries import need_seats
    from peertune.recipe import load_recipe

    place = out.resolve()
    others = not place.is_dir() or not all(file.is_file() and file.name.endswith(_OWN) for file in place.iterdir())
    if place == Path.cwd() or (place.exists() and others):
        raise IdentityError(f"{out}: holds something other than rosters; give another --out")
    with messages(), ca.opened(folder) as before:
        loaded = load_recipe(recipe, overrides)
        need_seats(loaded.clients, before.members)
        after, rosters = ca.issue_own_rosters(before, build_graph(loaded), graph_settings(loaded), above=above)
        seated = sum(bool(member.certificates) for member in after.members)
        with progress("rosters", seated) as show, written_folder(place) as beside:
            for written, (member, data) in enumerate(rosters, start=1):
                write_file(beside / f"{member.name}{_OWN}", data, lasting=False)
                show(written, "")
            ca.keep(folder, after)  # before they are in their place: no two rosters may have one serial
    _print_roster(after, "rosters", "each member's own roster", out, as_json)


@peer_app.command("request")
def request_certificate(
    name: Annotated[str, typer.Option(help="The peer's name: lower-case letters, digits, hyphens.")],
    address: Annotated[
        str | None, typer.Option(help="host:port at which others reach it; leave out if it can only dial out.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="The peer's folder.")] = Path("peer"),
    as_json: AsJson = False,
) -> None:
    """Make a key, which never leaves the folder, and a request to send to the CA. Asked again, it renews.

    The old key stays in use until the new certificate is in the roster.

    Example:

      peertune peer request --name hospital-3 --address hospital-3.example.org:50051
    """
    from peertune.identity.certificates import fingerprint_of
    from peertune.identity.keys import load_ca, request

    asked = request(folder, name, address)
    try:
        ca = fingerprint_of(load_ca(folder))
    except IdentityError:
        ca = None
    if as_json:
        facts = {"request": str(asked.file), "renews": asked.renews, "ca_fingerprint": ca}
        print_json({"name": name, "address": address, "fingerprint": asked.fingerprint, **facts})
        return
    print(f"name         {name}")
    print(f"address      {address or 'none: it can only dial out'}")
    print(f"fingerprint  {asked.fingerprint}")
    print(f"the CA's     {ca or 'not known here yet: have it read out in the same call, for --ca-fingerprint'}")
    print(f"request      {asked.file}: send it to the CA, and put the certificate that comes back in {folder}")
