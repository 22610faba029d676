"""Adapters for others: merged into their base, and put on the Hugging Face hub."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import logging, validate_repo_id  # type: ignore[attr-defined]  # documented all the same
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from peertune.adapters.peft_format import LOADERS, merge_adapter
from peertune.errors import ModelError, RunError
from peertune.models.heads import head_config
from peertune.models.load import MODELS
from peertune.models.weights import check_weights, digests
from peertune.recipe import load_recipe
from peertune.runs import directory


def merge(run: Path, folder: Path) -> str:
    """Turn a folder with an adapter of the run into one with the whole model, which `transformers` loads by itself.

    The base is loaded as its users load it, so all that its configuration says goes on. The sum of base and adapter,
    and the head, have the precision in which the base is stored, which is returned (`bfloat16`); a base that the run
    held in 4 bits is taken as it is stored, too. What makes tokens or pixels of a row lies beside the weights, where
    the base has it.

    Raises ModelError where the base can't be had, is stored quantised or has other weights than the run began with, and
    where a weight comes out that is not finite.
    """
    recipe, labels = load_recipe(directory.resolved(run)), json.loads((folder / "labels.json").read_text("utf-8"))
    base, companion = _load(recipe.model.name, recipe.model.revision, directory.pipeline_tag(run), labels)
    head = json.loads((folder / "adapter_config.json").read_text("utf-8"))["modules_to_save"] or ()
    body = {"body": digests(base.state_dict(), head)["body"]}  # the head is the adapter's
    check_weights(recipe.model.name, body, directory.weights(run))
    model: Any = merge_adapter(base, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # else `transformers` adds the adapter once more
        (folder / name).unlink()
    model.save_pretrained(folder)
    if companion is not None:
        companion.save_pretrained(folder)
    for file in folder.iterdir():  # safetensors writes for its owner alone
        file.chmod(folder.stat().st_mode & 0o666)
    return str(model.dtype).removeprefix("torch.")


def _load(name: str, revision: str | None, purpose: str, labels: Sequence[str]) -> tuple[nn.Module, Any]:
    """Load a base, and the tokenizer or processor that it comes with, if any."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = str(MODELS.get(name, name))
    common: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    head = head_config(labels) if purpose in ("text-classification", "image-classification") else {}
    try:
        config = AutoConfig.from_pretrained(source, **head, **common)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"--merge: {name} is stored quantised; export the adapter alone")
        model = getattr(transformers, LOADERS[purpose]).from_pretrained(
            source, config=config, dtype="auto", use_safetensors=True, ignore_mismatched_sizes=True, **common
        )
    except ModelError:
        raise
    except Exception as error:  # on a damaged file, parsers raise whatever they stumble over
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"--merge: the base {name} can't be loaded ({said}); fetch it again, or put it back") from None
    try:
        companion = _COMPANIONS.get(purpose, AutoTokenizer).from_pretrained(source, **common)
    except (OSError, ValueError):  # it has none
        companion = None
    if purpose == "text-classification" and companion is not None:  # batches are padded as they were in training
        companion.pad_token = companion.pad_token or companion.eos_token
        model.config.pad_token_id = companion.pad_token_id
    return model, companion


_COMPANIONS: dict[str, Any] = {
    "image-classification": AutoImageProcessor,
    "zero-shot-image-classification": AutoProcessor,
}


def check_push(name: str) -> None:
    """Raise RunError where nothing can be put on the hub as `name`, as far as can be said without asking the hub."""
    try:
        validate_repo_id(name)
        owned = "/" in name
    except HFValidationError:
        owned = False
    if not owned:
        raise RunError(f"--push: {name!r} is no OWNER/NAME of letters, digits, '-', '_' and '.'; write me/my-adapter")
    if constants.HF_HUB_OFFLINE:
        raise RunError("--push: HF_HUB_OFFLINE is set, so nothing can be put on the hub; unset it")
    token = get_token()
    if token is None:
        raise RunError("--push: there is no token of the hub; type `hf auth login`, or set HF_TOKEN")
    if not token.isascii() or not token.isprintable() or " " in token:  # HTTP's own complaint would show it
        raise RunError("--push: the token of the hub holds what no token holds; copy it again")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Put all files of a folder on the hub as the model `name`, in one commit, and return its address.

    The model is made where it isn't there. Raises RunError where the hub refuses or can't be reached, where the model
    holds files already, and where it is public and should be `private`.
    """
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    api = HfApi(token=get_token())
    with _told(name):
        address = str(api.create_repo(name, private=private or None, exist_ok=True))
        found = api.model_info(name)
    files = sorted({file.rfilename for file in found.siblings or ()} - {".gitattributes"})
    if files:
        raise RunError(f"--push: {name} is there already and holds {files[0]}; give another name")
    if private and not found.private:
        raise RunError(f"--push: {name} is there already, open to all; make it private, or leave out --private")
    with _told(name):
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="What peertune exported")
    return address


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Say in one line what the hub has against it, and never the token."""
    try:
        yield
    except HfHubHTTPError as error:
        status, said = error.response.status_code, " ".join((error.server_message or "").split())[:200]
        reason = {
            401: f"does not know the token; make one at {constants.ENDPOINT}/settings/tokens",
            403: f"does not let this token write to {name}; take one that may, or another name",
            404: f"knows no {name}, nor may this token make it; check the name",
        }.get(status, f"answers {status} ({said.replace(str(get_token()), '…') or 'no reason'}); try again later")
        raise RunError(f"--push: {constants.ENDPOINT} {reason}") from None
    except Exception as error:  # of the network, in whatever words the libraries below have
        raise RunError(
            f"--push: {constants.ENDPOINT} can't be reached ({type(error).__name__}); check the network and try again"
        ) from None
