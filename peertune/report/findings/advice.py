"""What can be changed about a run, in the recipe's words: only what its recipe leaves room for."""

from collections.abc import Sequence

from peertune.report.findings.evidence import Facts

LONGEST_PATIENCE_S = 86_400.0


def either(ways: Sequence[str]) -> str:
    """Return the ways as a sentence: "Raise this, change that, or do the other."; "" where there are none."""
    if not ways:
        return ""
    told = ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}{',' * (len(ways) > 2)} or {ways[-1]}"
    return f"{told[0].upper()}{told[1:]}."


def meet_more(seen: Facts) -> list[str]:
    """Return how clients can meet more often in a round."""
    graph = seen.recipe["graph"]
    activation = graph.get("activation", 1.0)
    ways = [f"raise graph.activation from {activation:g}"] if activation < 1 else []
    if graph["name"] in ("edges", "trace"):
        ways.append("add edges to the file in graph.path")
    if "fan_out" in graph:
        ways.append(f"raise graph.fan_out from {graph['fan_out']}")
    elif graph["name"] != "complete":
        ways.append("choose a denser graph.name")
    return ways


def send_both(seen: Facts) -> str:
    """Return how both factors come to be sent; T* is for a graph that mixes."""
    mixes = seen.facts["graph"]["switching_interval"] is not None
    return f"send both factors with algorithm.name={'tad_lora' if mixes else 'adf_lora'}"


def last_longer(seen: Facts) -> list[str]:
    """Return how phases can last longer and still take turns within the run."""
    length = seen.recipe["algorithm"].get("switch_every")
    if not isinstance(length, int) or 4 * length > seen.recipe["rounds"]:
        return []
    return [f"raise algorithm.switch_every from {length}, so that jumps are rarer"]


def take_turns(seen: Facts, interval: int) -> str:
    """Return how phases come to last `interval` rounds, each factor having at least one of them."""
    method = " with algorithm.name=tad_lora" if seen.method == "rolora" else ""
    if 2 * interval <= seen.recipe["rounds"]:
        return f"Set algorithm.switch_every={interval}{method}."
    long = f"set algorithm.switch_every={interval}{method} and rounds={2 * interval} or more"
    return either([long, *(f"{way}, which makes T* shorter" for way in meet_more(seen)[:1])])


def flood(seen: Facts) -> list[str]:
    """Return how reports come to reach everybody within a window."""
    window = seen.recipe["algorithm"].get("window_rounds")
    raised = [] if window is None else [f"raise algorithm.window_rounds from {window}, so that reports reach everybody"]
    return [*raised, *meet_more(seen)]


def hear_others(seen: Facts) -> str:
    """Return how clients whose own rows are mostly of one class get to know the others."""
    ways = [*meet_more(seen), "run for more rounds"] if seen.exchanges else []
    if seen.clients > 1 and not seen.exchanges:
        ways = [f"choose another algorithm.name than {seen.method}"]
    if "peers" not in seen.facts and seen.clients > 1 and seen.recipe.get("partition", {}).get("name") != "iid":
        ways.append("choose a milder partition")  # peers may have rows of their own
    return either(ways)


def wait_longer(seen: Facts) -> str:
    """Return how to wait for peers that are slow."""
    if seen.recipe.get("network", {}).get("patience_s", 0.0) >= LONGEST_PATIENCE_S:
        return ""
    return " Raise network.patience_s where they are slow, or restart within it."
