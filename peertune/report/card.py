"""A model card: what an exported adapter or model is, for those who were not there, from the run directory alone."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template
from types import MappingProxyType
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peertune.adapters.peft_format import LOADERS
from peertune.errors import RecipeError
from peertune.models.load import MODELS
from peertune.report.runs import RunData
from peertune.report.spending import judged
from peertune.report.tables import summarise
from peertune.runs import directory

_DATA = {"glue": "nyu-mll/glue"}  # task → where its data are on the hub, if the recipe does not say
_ONE_BY_ONE = 50  # clients whose rows are told one by one


def card(
    run: RunData,
    name: str,
    client: int | None,
    round: int,
    merged: str | None,
    own: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return the README.md of one client's adapter, or of the average where `client` is None, with the hub's metadata.

    `name` says where it is to be found, `round` how many rounds its checkpoint has made, `merged` in which precision it
    was added to the base, where it was. `own` is what PEFT's configuration of the adapter says and the run's doesn't.
    Of a path on this machine only the last part is told. Raises RunError where the run does not say what its adapters
    are for.
    """
    recipe, purpose = run.recipe, directory.pipeline_tag(run.folder)  # which looks whether the adapter is whole
    lora = json.loads((run.folder / "adapter" / "adapter_config.json").read_text()) | dict(own)
    evaluated = [record for record in run.records if record["round"] < round and record["evaluation"]]
    row, score = summarise(evaluated), _score(evaluated[-1], client) if evaluated else {}
    task = "/".join([recipe["task"]["name"], *filter(None, [recipe["task"].get("config")])])
    data = None if recipe["task"].get("path") else recipe["task"].get("id") or _DATA.get(recipe["task"]["name"])
    results = None
    if score and evaluated[-1]["round"] == round - 1:
        results = [EvalResult(purpose, data or task, task, name, value) for name, value in score.items()]
    about = ModelCardData(
        base_model=recipe["model"]["name"] if _on_the_hub(recipe["model"]) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag=purpose,
        datasets=data,
        metrics=[one["metric"] for one in _by_metric(evaluated[-1])] if evaluated else None,
        tags=["peertune", "lora", "federated-learning", recipe["algorithm"]["name"]],
        model_name=name,
        eval_results=results,
    )
    whose = "the average of all clients" if client is None else f"client {client}"
    text = Template(files("peertune.report").joinpath("card.md").read_text(encoding="utf-8")).substitute(
        _training(run, lora, round, sized=not own),
        name=name,
        what=f"A model with the LoRA adapter of {whose} merged in, in {merged}"
        if merged
        else f"The LoRA adapter of {whose}",
        results=_results(row, score, evaluated, round),
        privacy=_privacy(run, round),
        code=_code(run, purpose, name, merged),
    )
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}"))


def _training(run: RunData, lora: Mapping[str, Any], round: int, *, sized: bool) -> dict[str, str]:
    """Say how it was trained, by the template's names; with its parameters where it is `sized` as the run's."""
    recipe, facts, training = run.recipe, run.facts, run.recipe["training"]
    graph, targets = facts["graph"], lora["target_modules"]
    how = "exact" if graph["draws"] == 0 else f"estimated from {graph['draws']:,} draws"
    among = f"{recipe['clients']} parties, each on its own rows and with no server between them"
    if not facts.get("peer"):
        among = f"{recipe['clients']} clients in a simulation on one machine"
    return {
        "among": among,
        "base": _base(recipe["model"]),
        "adapter": f"rank {lora['r']}, `lora_alpha` {lora['lora_alpha']:g}, {_unusual(lora)}in "
        + (f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{target}`" for target in sorted(targets)))
        + (f"; {facts['parameters']['adapter']:,} parameters, " if sized else "; ")
        + f"head {recipe['head']}",
        "task": _settings(recipe["task"]),
        "method": _settings(recipe["algorithm"]),
        "graph": f"{_settings(recipe['graph'])}; rho {graph['rho']:.4f} ({how}), T\\* {graph['switching_interval']}",
        "clients": str(recipe["clients"]),
        "rows": _rows([sum(held) for held in facts["partition"]["rows"]]),
        "rounds": f"{round} of {recipe['rounds']}, each of {training['local_steps']} local steps with "
        f"{training['per_device_train_batch_size']} rows; {training['optim']} at {training['learning_rate']:g}",
        "seed": str(recipe["seed"]),
    }


def _privacy(run: RunData, round: int) -> str:
    """Say what bounds what the weights of so many rounds tell of rows."""
    recipe, asked = run.recipe, run.recipe.get("privacy")
    if asked is None:
        return "None: no noise was added, and weights can tell of the rows that they were trained on."
    spent, by_client = f"{_spent(run, round)}, at δ {asked['delta']:g}", asked.get("unit") == "client"
    whose = "of each client, by all of its rows together" if by_client else "of each single row of each client"
    beyond = (
        "of what is true at many clients" if by_client else "of what many rows of one person or one site tell together"
    )
    if run.facts.get("peer"):
        whose = "of all of this party's rows together" if by_client else "of each single row of this party"
        beyond += ", nor of other parties' rows: what those did is not known here"
    how = (
        f"What a client's adapter changed in a round was cut to the norm {asked['max_grad_norm']:g}, and Gaussian "
        "noise was added."
        if by_client
        else "Local steps took rows by Poisson sampling, cut each row's gradient to the norm "
        f"{asked['max_grad_norm']:g}, and added Gaussian noise."
    )
    begun = recipe["lora"].get("init")
    start = f" It began from the adapter {Path(begun).name}, whose rows are not counted." if begun else ""
    return f"Differential privacy {whose}: {spent}. {how} It says nothing {beyond}.{start}"


def _spent(run: RunData, round: int) -> str:
    """Say what was spent in so many rounds, by the client that spent most."""
    made = [record for record in run.records if record["round"] < round]
    if made and made[-1].get("epsilon"):
        return f"ε {max(made[-1]['epsilon']):.3g} at most"
    from peertune.privacy.accountant import epsilon

    told, delta = run.facts["privacy"]["clients"], run.facts["privacy"]["delta"]
    made_at_most = round * run.facts["privacy"]["per_round"]
    steps = [min(made_at_most, one["most_steps"] or made_at_most) for one in told]
    try:
        each = [epsilon(one["noise_multiplier"], one["rate"], n, delta) for one, n in zip(told, steps, strict=True)]
    except RecipeError:  # dp-accounting is not here
        return "ε not told"
    return f"ε {max(each):.3g} at most"


def _unusual(lora: Mapping[str, Any]) -> str:
    """Say by which of PEFT's settings the scale isn't the same everywhere, or isn't `lora_alpha / r`."""
    told = [f"`{key}` `{json.dumps(lora[key])[:200]}`, " for key in ("rank_pattern", "alpha_pattern") if lora.get(key)]
    told += ["which PEFT reads and not every server does, "] if told else []
    return "".join([*told, "scaled by `lora_alpha / sqrt(r)`, " if lora.get("use_rslora") else ""])


def _on_the_hub(model: Mapping[str, Any]) -> bool:
    """Whether others find the base by its name: what came from the hub has a commit."""
    return model["name"] not in MODELS and model["revision"] is not None and not Path(model["name"]).is_dir()


def _base(model: Mapping[str, Any]) -> str:
    if model["name"] in MODELS:
        return f"`{model['name']}`, which comes with peertune"
    if not _on_the_hub(model):
        return f"`{Path(model['name']).name}`, a folder"
    return f"[{model['name']}](https://huggingface.co/{model['name']}) at `{model['revision']}`"


def _settings(part: Mapping[str, Any]) -> str:
    """Return a named part's name and settings: `ring`, activation 0.1."""
    told = [f"`{part['name']}`"]
    for key, value in part.items():
        if key == "path" and value:
            value = Path(value).name
        if key not in ("name", "row_counts") and value is not None:  # a card is for all to see
            text = json.dumps(value, ensure_ascii=False)
            told.append(f"{key} {text}" if isinstance(value, int | float) else f"{key} `{text[:200]}`")
    return ", ".join(told)


def _rows(held: Sequence[int]) -> str:
    if len(held) == 1:
        return f"{held[0]:,} at this client"
    if len(held) > _ONE_BY_ONE:
        return f"{sum(held):,} in all, a client has {min(held):,} to {max(held):,}, the median {median(held):,.0f}"
    return f"{sum(held):,} in all; of the clients in order {', '.join(f'{rows:,}' for rows in held)}"


def _by_metric(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a record's evaluation, and the same by the task's other metrics."""
    return [record["evaluation"], *record["evaluation"].get("also", ())]


def _score(record: Mapping[str, Any], client: int | None) -> dict[str, float]:
    """Return the score of what was exported by metric; {} where the record has none."""
    found = {}
    for evaluation in _by_metric(record):
        scores: dict[int | None, float | None] = dict(zip(judged(record), evaluation["clients"], strict=True))
        score = (scores | {None: evaluation["average"]}).get(client)
        if score is not None:
            found[evaluation["metric"]] = score
    return found


def _results(
    row: Mapping[str, Any], score: Mapping[str, float], evaluated: Sequence[Mapping[str, Any]], round: int
) -> str:
    if not evaluated:
        return "None of its rounds was evaluated."
    last, evaluation = evaluated[-1]["round"], evaluated[-1]["evaluation"]
    count = len(evaluation["clients"])
    told = []
    for metric in (row, *row.get("also", ())):
        lines = [f"{metric['metric']} on {evaluation['rows']:,} validation rows, after {last + 1} rounds:", ""]
        if (own := score.get(metric["metric"])) is not None:
            lines.append(f"- **this one: {own:.3f}**" + ("" if last == round - 1 else ", some rounds before"))
        if count > 1:
            lines.append(
                f"- the clients' own models: {metric['mean']:.3f} ± {metric['spread']:.3f} (mean and standard "
                f"deviation over {count} clients), from {metric['min']:.3f} to {metric['max']:.3f}"
            )
        if "average" in metric:
            lines.append(f"- the averaged adapter: {metric['average']:.3f}")
        if "constant" in metric:
            lines.append(f"- the best answer that is the same for all rows: {metric['constant']:.3f}")
        told.append("\n".join(lines))
    return "\n\n".join(told)


def _code(run: RunData, purpose: str, name: str, merged: str | None) -> str:
    """Return the Python that loads what was exported."""
    model, loader = run.recipe["model"], LOADERS[purpose]
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})" if merged and "text" in purpose else ""
    imports = [f"from transformers import {loader}{', AutoTokenizer' * bool(tokenizer)}"]
    if merged:
        return "\n".join([*imports, "", f"model = {loader}.from_pretrained({json.dumps(name)})", tokenizer]).rstrip()
    where = [json.dumps(model["name"] if _on_the_hub(model) else Path(model["name"]).name)]
    if model["name"] in MODELS:
        imports.append("from peertune.models.load import MODELS")
        where = [f"MODELS[{where[0]}]"]
    if _on_the_hub(model):
        where.append(f"revision={json.dumps(model['revision'])}")
    if purpose in ("text-classification", "image-classification"):
        where.append(f"num_labels={len(run.facts['partition']['labels'])}, ignore_mismatched_sizes=True")
    return "\n".join(
        [
            "from peft import PeftModel",
            *imports,
            "",
            f"base = {loader}.from_pretrained({', '.join(where)})",
            f"model = PeftModel.from_pretrained(base, {json.dumps(name)})",
        ]
    )
