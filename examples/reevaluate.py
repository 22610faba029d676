"""Score the adapters of a finished run on the handwritten digits once more, by PEFT and scikit-learn alone.

    python examples/reevaluate.py RUN BASE     # BASE: the folder peertune/models/digits-vit

Nothing of peertune is imported: rows are drawn from scikit-learn's digits by the rule that the recipe names,
predictions are PEFT's, accuracy is scikit-learn's. Prints each model's score beside the recorded one, and ends with 1
where one differs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import PeftModel
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
from transformers import ViTForImageClassification, logging

FORMS = [0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667]  # where each writer's rows begin


def validation_rows(recipe: dict[str, Any]) -> tuple[torch.Tensor, "np.ndarray[Any, Any]"]:
    """Return pixels `[N, 1, 8, 8]` in [-1, 1] and classes `[N]`, 0 for the digit 5, of the rows that all clients share.

    A run whose rows only peertune can tell ends this in one line.
    """
    task, evaluate = recipe["task"], recipe["evaluate"]
    if task["name"] != "digits":
        sys.exit(f"task.name is {task['name']}: only the rows of digits are known here")
    drawn = [key for key in ("rows", "fold") if evaluate[key] is not None] + ["on"] * (evaluate["on"] == "own")
    if task["validation_split"] is not None or drawn:
        sys.exit(f"{' '.join(drawn) or 'validation_split'}: peertune draws these rows; take a run without")
    levels, digits = load_digits(return_X_y=True)
    rows = np.flatnonzero(digits >= 5)
    if task["held_out_writers"] is None:
        _, rows = train_test_split(rows, test_size=0.2, stratify=digits[rows], random_state=0)
        rows.sort()
    else:
        writers = np.searchsorted(FORMS, rows, side="right") - 1
        rows = rows[np.isin(writers, task["held_out_writers"])]
    pixels = torch.tensor(levels[rows] / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return pixels, digits[rows] - 5


def main() -> None:
    """Compare all adapters of a run with its last record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a finished run of task digits")
    parser.add_argument("base", help="the folder of the base model")
    options = parser.parse_args()
    logging.set_verbosity_error()  # that the head is not the base's but the adapter's, for each
    logging.disable_progress_bar()
    try:
        pixels, classes = validation_rows(yaml.safe_load((options.run / "resolved.yaml").read_text()))
        last = json.loads((options.run / "rounds.jsonl").read_text().splitlines()[-1])["evaluation"]
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}; give the directory of a finished run")
    recorded = {f"client-{k:03d}": score for k, score in enumerate(last["clients"])} | {"average": last["average"]}
    differ = 0
    for name, expected in recorded.items():
        base = ViTForImageClassification.from_pretrained(options.base, num_labels=5)
        model = PeftModel.from_pretrained(base, options.run / "adapters" / name).eval()
        with torch.no_grad():
            found = accuracy_score(classes, model(pixel_values=pixels).logits.argmax(-1).numpy())
        differs = abs(found - expected) > 1e-9
        differ += differs
        print(f"{name:10}  recorded {expected:.4f}  found {found:.4f}{'  DIFFERS' if differs else ''}")
    print(f"{len(recorded) - differ} of {len(recorded)} scores are the recorded ones, on {len(classes)} rows")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
