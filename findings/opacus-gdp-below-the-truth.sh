#!/usr/bin/env bash
# Opacus' accountant `gdp` states an epsilon below what the training gives away.
#
# It takes T steps of a sampled Gaussian to be one Gaussian, by a central limit that holds as T grows. With a noise
# multiplier of 0.6, a rate of 0.02, 500 steps and a delta of 1e-5 it is far off: opacus 1.6.0 states 8.41. The truth lies
# between 10.26 and 10.28, by dp-accounting 0.6.0, which rounds every loss down for the one and up for the other. Opacus'
# `prv` and `rdp` state more than that, as bounds should. A warning that `gdp` "can underestimate" comes as it is made,
# but not from the functions of `opacus.accountants.analysis.gdp`. Who takes the smallest of several answers takes it.
set -euo pipefail
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
python3 -m venv "$there/env"
"$there/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 opacus==1.6.0 dp-accounting==0.6.0 2> /dev/null

said=$("$there/env/bin/python" -W ignore - <<'PY'
from importlib.metadata import version

from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from opacus.accountants import create_accountant

noise, rate, steps, delta = 0.6, 0.02, 500, 1e-5
print("opacus", version("opacus"))
for name in ("gdp", "prv", "rdp"):
    accountant = create_accountant(name)
    accountant.history = [(noise, rate, steps)]
    print(f"{name}: {accountant.get_epsilon(delta):.2f}")
ends = []
for pessimistic in (False, True):
    one = from_gaussian_mechanism(
        noise, pessimistic_estimate=pessimistic, use_connect_dots=pessimistic, sampling_prob=rate
    )
    ends.append(one.self_compose(steps).get_epsilon_for_delta(delta))
print(f"dp-accounting {version('dp-accounting')}: between {ends[0]:.2f} and {ends[1]:.2f}")
PY
)
echo "$said"
[ "$said" = "opacus 1.6.0
gdp: 8.41
prv: 10.29
rdp: 11.82
dp-accounting 0.6.0: between 10.26 and 10.28" ] || { echo "this has changed" >&2; exit 1; }
