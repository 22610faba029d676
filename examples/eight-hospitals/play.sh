#!/usr/bin/env bash
# Eight hospitals on one machine: a CA, eight peers as processes of their own, one of them killed and started again.
#
#   examples/eight-hospitals/play.sh [FOLDER] [KEY=VALUE]...      # in the folder runs/eight-hospitals if none is given
#
# KEY=VALUE are keys of the recipe, such as algorithm.name=dec_lora. In the environment:
#
#   ROUNDS   how many (60)
#   PORT     the first of eight ports on 127.0.0.1 (52101)
#   DATA     a folder with one folder for each hospital, hospital-1 to hospital-8, with its own train and validation
#            files; needs a recipe whose task reads files, in RECIPE. Where not given, the recipe deals the rows out.
#   RECIPE   another recipe
#
# Between real parties each line below is typed by whom its comment names, each on a machine of its own: docs/deploy.md.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
PATH="$here/../../.venv/bin:$PATH" # what make install set up, if it did
ROUNDS=${ROUNDS:-60} PORT=${PORT:-52101} RECIPE=$(absolute "${RECIPE:-$here/recipe.yaml}") DATA=${DATA:+$(absolute "$DATA")}
folder=${1:-runs/eight-hospitals}
[ $# -eq 0 ] || shift
settings=("rounds=$ROUNDS" "$@")
export OMP_NUM_THREADS=1 # eight processes share the cores
mkdir -p "$(dirname "$folder")"
mkdir "$folder" # an old play stays as it is
cd "$folder"

pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT

start() { # start K OPTION...: hospital K's peer, in the background
    local k=$1
    shift
    peertune peer start "$@" --dir "hospital-$k" ${DATA:+--data "$DATA/hospital-$k"} >>"hospital-$k.log" 2>&1 &
    pids[k]=$!
}

rounds() { # rounds K: how many hospital K has done
    if [ -f "runs/hospital-$1/rounds.jsonl" ]; then wc -l <"runs/hospital-$1/rounds.jsonl"; else echo 0; fi
}

reach() { # reach K N: wait until hospital K has done N rounds
    until [ "$(rounds "$1")" -ge "$2" ]; do
        kill -0 "${pids[$1]}" 2>/dev/null || { tail -n 3 "hospital-$1.log"; exit 1; }
        sleep 0.1
    done
}

echo "== who is a member"
peertune ca init --federation hospitals # whoever runs the CA, once
for k in 1 2 3 4 5 6 7 8; do
    # The hospital: makes a key, which stays in its folder, and sends the request to the CA.
    peertune peer request --name "hospital-$k" --address "127.0.0.1:$((PORT + k - 1))" --dir "hospital-$k" >/dev/null
    # The CA: compares fingerprints by telephone, both ways, approves, and sends the certificate back. Here: into the folder.
    peertune ca approve "hospital-$k/hospital-$k.request.pem" --yes >/dev/null
done
peertune roster >/dev/null # the CA: the list of all, signed, for each of them
peertune ca list

echo "== eight peers"
for k in 1 2 3 4 5 6 7 8; do # each hospital, when it likes: nobody leads
    cp roster.yaml "hospital-$k/roster.yaml"
    start "$k" --recipe "$RECIPE" "${settings[@]}" --roster "hospital-$k/roster.yaml" --out "runs/hospital-$k"
done

echo "== hospital-3 loses power"
reach 3 $((ROUNDS / 4))
kill -KILL "${pids[3]}"
wait "${pids[3]}" 2>/dev/null || true
lost=$(rounds 3)
echo "killed after $lost rounds"
reach 1 $((lost + 3)) # the others wait for it for network.patience_s, and go on
echo "hospital-1 has done $(rounds 1) rounds; hospital-3 starts again"
start 3 --resume runs/hospital-3 --roster hospital-3/roster.yaml

for k in 1 2 3 4 5 6 7 8; do
    wait "${pids[k]}" || { tail -n 3 "hospital-$k.log"; exit 1; }
done
echo "hospital-3 has done $(rounds 3) rounds, of $ROUNDS; the others missed it in those between"
grep -h "peertune: " hospital-1.log hospital-3.log || true # what they said about it

echo "== what came of it"
peertune report runs --out report.html # all eight runs, put together
peertune compare runs
# Each log ends with a table of one row: what stands below `mean`.
scores=$(for k in 1 2 3 4 5 6 7 8; do
    awk -v run="hospital-$k" '$1 == "run" { for (n = 1; n <= NF; n++) if ($n == "mean") place = n } $1 == run { print $place }' "hospital-$k.log"
done)
echo "the adapters' scores, hospital 1 to 8: $(echo $scores)"
pids=()
