"""Finding a model in a local folder or on the hub, and checking its files before any library reads them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from .files import check_links, read_json
from .text import clipped, first_line, refuse_secrets, shown
from .weights import weight_shapes

# The files of a model to download: no code and no pickles; the weights last.
SMALL_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]
WEIGHT_FILES = ["*.safetensors"]
# What the names of quantised copies of a model end with.
QUANTIZED_NAME = re.compile(r"(-unsloth)?-(bnb-8bit|8bit|int8|AWQ|GPTQ|FP8|MXFP4|NVFP4)\b.*", re.IGNORECASE)


def find_model(name: str, revision: str | None = None, weights: bool = True) -> tuple[Path, str | None]:
    """(folder, revision) of a local model folder, or of a model on the hub, which is downloaded if it is not cached.

    Args:
        revision: a commit or branch on the hub; default the newest commit.
        weights: False downloads only the other files.

    Returns:
        The folder, and the commit on the hub (None for a local folder).

    Raises:
        ValueError: there is no such model, its files are not safe to read, it is quantised in a way that is not
            supported, or the hub can't be reached.
    """
    refuse_secrets(name, "model")
    path = Path(name)
    if path.is_dir():
        _check_folder(path, name)
        return path, None
    if path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ValueError(f"model '{name}': no such folder; expected a local model folder or a hub id like OWNER/NAME")

    folder = _download(name, revision, SMALL_FILES)
    _check_folder(folder, name)
    if weights:
        _download(name, folder.name, WEIGHT_FILES)
        _check_folder(folder, name)
    return folder, folder.name


def _download(name: str, revision: str | None, patterns: list[str], offline: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except HFValidationError:
        raise ValueError(f"model '{name}': no local folder, and no valid hub id") from None
    except (HTTPError, OSError) as e:
        why = hub_answer(e, name)
        if not why and not offline:  # some versions ask the hub for a commit's list of files that an older cache lacks
            return _download(name, revision, patterns, offline=True)
        why = why or (
            "no local folder of this name, and the Hugging Face hub can't be reached; "
            "give a local model folder with --model DIR, or try --demo, which needs no network"
        )
        raise ValueError(f"model '{name}': {why}") from None


def hub_answer(error: BaseException, name: str, kind: str = "model") -> str:
    """What the Hugging Face hub refused, and what to do, in one line; "" if it was not reached, or refused nothing.

    Args:
        error: what huggingface_hub or datasets raised. name: OWNER/NAME. kind: model or dataset.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    answer = _refusal(error, name, kind)
    if answer is None:
        return ""
    code, wait = answer.response.status_code, answer.response.headers.get("Retry-After", "")
    when = f"in {wait} s" if wait.isdecimal() else "later"
    address = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    local, log_in = "file" if kind == "dataset" else "folder", "log in (`hf auth login` or HF_TOKEN)"
    for error_type, text in (
        (GatedRepoError, f"access is restricted; accept the licence at {address}, then {log_in}"),
        (RevisionNotFoundError, "the Hugging Face hub has no such revision of it"),
        (RepositoryNotFoundError, f"not on the Hugging Face hub, and no local {local}; if it is private, {log_in}"),
    ):
        if isinstance(answer, error_type):
            return text
    other = f"the Hugging Face hub answers HTTP {code} ({clipped(answer, 80)})"
    return {
        401: f"the Hugging Face hub wants a valid token (HTTP 401), and got none or a wrong one; {log_in}",
        403: f"the token may not read it (HTTP 403); look at {address}, then {log_in} with one that may",
        429: f"too many requests to the Hugging Face hub (HTTP 429); try again {when}, or {log_in} to be allowed more",
    }.get(code, f"the Hugging Face hub is not available (HTTP {code}); try again {when}" if code >= 500 else other)


def _refusal(error: BaseException, name: str, kind: str) -> Any:
    """The hub's answer (an HfHubHTTPError) that led to an error, or None."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, HfHubHTTPError):
        seen = seen.__cause__ or seen.__context__
    if seen is None and kind == "dataset":  # datasets drops the cause, so ask again
        try:
            HfApi().auth_check(name, repo_type=kind)
        except HfHubHTTPError as e:
            return e
        except (HTTPError, OSError, ValueError):
            return None
    return seen


def _check_folder(folder: Path, name: str) -> None:
    """Check the files of a model that are not safe to pass to a library.

    Raises:
        ValueError: a file links out of the folder, config.json is unreadable, the architecture would need the model's
            own code, the weights are quantised in a way that is not supported, or config.json states more layers than
            there are weights (building them would take forever).
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model '{name}': the folder has no config.json; expected a Hugging Face model folder")
    check_links(folder)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model '{name}': model_type {shown(kind)} in config.json is unknown to transformers "
            f"{transformers.__version__}; expected one that it knows, since the code of a model is never executed"
        )
    _refuse_quantization(config, name)
    layers = [v for k, v in config.items() if re.fullmatch("(num|n)(_hidden)?_layers?", k) and isinstance(v, int)]
    if any(abs(n) > 1000 for n in layers) and max(map(abs, layers)) > len(weight_shapes(folder)):
        raise ValueError(
            f"model '{name}': config.json says {clipped(max(layers), 20)} layers, more than there are weights"
        )


def _refuse_quantization(config: dict[str, Any], name: str) -> None:
    """Raise ValueError if config.json names another quantization than bitsandbytes' 4 bits.

    Of 4 bits the weights decide: files that were dequantised may still name them.
    """
    how = config.get("quantization_config")
    if not how or not isinstance(how, dict):
        return
    method = how.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in how or "load_in_4bit" in how else "")
    if method == "bitsandbytes" and how.get("load_in_8bit"):
        method = "bitsandbytes int8 (load_in_8bit)"
    elif method == "bitsandbytes":
        return
    plain = QUANTIZED_NAME.sub("", name)
    example = "" if plain == name or Path(name).is_dir() else f" (perhaps {plain})"
    raise ValueError(
        f"model '{name}': its weights are quantised by {clipped(method, 40) or 'an unnamed method'}, which is not "
        f"supported; give the unquantised model{example}, or one in bitsandbytes' 4 bits. If they are in 16 bits after "
        "all, remove quantization_config from config.json"
    )


def read_config(folder: Path, name: str) -> transformers.PreTrainedConfig:
    """The config.json of a model's folder, without its quantization_config: the weights say how they are stored."""
    with refusing(f"model '{name}': no usable config.json"):
        values = transformers.PreTrainedConfig._decode_special_floats(read_json(folder / "config.json"))
        values.pop("quantization_config", None)
        ministral = values["model_type"] == "mistral" and "layer_types" in values  # as AutoConfig has it
        return transformers.CONFIG_MAPPING["ministral" if ministral else values["model_type"]].from_dict(values)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Convert any error in this context to a ValueError of one line: damaged files cause errors of every type."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{what} ({clipped(first_line(e))})") from None
