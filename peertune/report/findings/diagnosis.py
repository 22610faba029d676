"""What a run's records say, in words: what went wrong, the numbers behind it, and which keys of the recipe to change.

Each of `CHECKS` looks for one thing and is a pure function of the recipe, its facts and the records; nothing is trained
or drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peertune.report.findings import budget, learning, mixing, phases, trust, waiting
from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import Finding, Said, Severity

CHECKS: Mapping[Severity, Mapping[str, Callable[[Facts], Said | None]]] = {
    "problem": {
        "oscillation": phases.oscillation,
        "phase_mismatch": phases.phase_mismatch,
        "no_contraction": mixing.no_contraction,
        "worse_than_rho": mixing.worse_than_rho,
        "rank_collapse": mixing.rank_collapse,
        "out_of_phase": phases.out_of_phase,
        "one_class": learning.one_class,
        "learning_rate": learning.learning_rate,
        "nothing_learnt": learning.nothing_learnt,
    },
    "notice": {
        "lost_edges": mixing.lost_edges,
        "interval": phases.interval,
        "still_learning": learning.still_learning,
        "too_short": learning.too_short,
        "no_exchange": mixing.no_exchange,
        "stragglers": waiting.stragglers,
        "kept_away": trust.kept_away,
        "budget_spent": budget.budget_spent,
    },
}
"""What is looked for: severity → a finding's name → its check, the gravest first."""


def diagnose(
    recipe: Mapping[str, Any], facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Return what the records show, gravest first; one finding of severity good where there is nothing else.

    `recipe` is the resolved one, `facts` what `facts.json` holds, `records` the lines of `rounds.jsonl`.
    """
    seen = Facts(recipe, facts, records)
    found = [
        Finding(name, severity, *said)
        for severity, checks in CHECKS.items()
        for name, check in checks.items()
        if (said := check(seen))
    ]
    return found or [Finding("healthy", "good", *learning.healthy(seen))]
