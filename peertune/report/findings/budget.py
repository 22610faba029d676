"""Findings about privacy that was spent."""

from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import Said, called


def budget_spent(seen: Facts) -> Said | None:
    """Clients whose budget had no room for another round, so that they trained nothing from there on."""
    if not seen.private or not seen.records:
        return None
    private = seen.facts["privacy"]
    told = {one["client"]: one for one in private["clients"]}
    up = {client: sum(client in record["clients"] for record in seen.records) for client in told}
    rooms = {
        client: one["most_steps"] // private["per_round"]
        for client, one in told.items()
        if one["most_steps"] is not None
    }
    over = {client: room for client, room in rooms.items() if up[client] > room}
    if not over:
        return None
    first = min(over, key=over.__getitem__)
    return Said(
        "Privacy budgets were spent before the end",
        f"{called(sorted(over)).capitalize()} of {len(told)} had no room for another round of local steps, client "
        f"{first} after {over[first]} rounds. From there they trained nothing, and went on mixing.",
        "Raise privacy.noise_multiplier or privacy.epsilon, or set fewer rounds"
        + ("." if private["unit"] == "client" else " or training.local_steps."),
    )
