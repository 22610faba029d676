"""What a run's records say, in words: what went wrong, the numbers behind it, and which keys of the recipe to change.

Each of `CHECKS` looks for one thing and is a pure function of the recipe, its facts and the records; nothing is trained
or drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peertune.report.findings import learning, mixing, phases
from peertune.report.findings.evidence import Facts
from peertune.report.findings.finding import Finding

CHECKS: tuple[Callable[[Facts], Finding | None], ...] = (
    phases.oscillation,
    phases.phase_mismatch,
    mixing.no_contraction,
    mixing.worse_than_rho,
    phases.out_of_phase,
    learning.one_class,
    learning.learning_rate,
    mixing.lost_edges,
    phases.interval,
    learning.nothing_learnt,
    learning.still_learning,
    learning.too_short,
    mixing.no_exchange,
)
"""What is looked for, the gravest first."""


def diagnose(
    recipe: Mapping[str, Any], facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[Finding]:
    """Return what the records show, gravest first; one finding of severity good where there is nothing else.

    `recipe` is the resolved one, `facts` what `facts.json` holds, `records` the lines of `rounds.jsonl`.
    """
    seen = Facts(recipe, facts, records)
    found = [finding for check in CHECKS if (finding := check(seen))]
    return sorted(found, key=lambda finding: finding.severity != "problem") or [learning.healthy(seen)]
