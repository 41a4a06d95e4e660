"""Finding a model in a local folder or on the hub, and checking its files before any library reads them."""

import errno
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub import constants, errors
from huggingface_hub.utils import parse_ratelimit_headers

from . import console
from .files import check_links, read_json
from .text import clipped, first_line, refuse_secrets, refusing, shown
from .weights import weight_shapes

# The files of a model to download: no code and no pickles; the weights last.
SMALL_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]
WEIGHT_FILES = ["*.safetensors"]
WAITS = (1, 2, 4, 8)  # seconds between requests to a hub that is busy; at most MOST_WAIT if it asks for longer
MOST_WAIT = 60
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}
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


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """snapshot_download, asking again if the hub is busy."""
    bars, waits = [], iter(WAITS)  # bars that the library leaves open

    class Bar(console.Bar):
        """Of the library's bars, the one that counts the bytes on disk is shown, as our bars are."""

        def __init__(self, *args: Any, **kwargs: Any):
            whole = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            how = {"desc": name, "leave": False, "dynamic_ncols": True, "disable": not (whole and console.shows_bars())}
            super().__init__(*args, **kwargs | how)
            self.label, self.told_at = name if whole else None, time.monotonic()
            bars.append(self)

        def set_description(self, *args: Any, **kwargs: Any) -> None:
            """The name stays."""

    # Offline, some versions ask the hub for the list of a commit's files, if another version filled the cache.
    how = {"revision": revision, "allow_patterns": patterns, "local_files_only": constants.is_offline_mode()}
    while True:
        try:
            return Path(huggingface_hub.snapshot_download(name, **how, tqdm_class=Bar))
        except errors.HFValidationError:
            raise ValueError(f"model '{name}': no local folder, and no valid hub id") from None
        except Exception as e:  # of the HTTP library, of the disk, or of hf_xet
            answer, least = _refusal(e, name, "model"), next(waits, 0)
            busy = answer is not None and (answer.response.status_code == 429 or answer.response.status_code >= 500)
            wait = max(least, _asked_to_wait(answer)) if busy and least else 0
            if not 0 < wait <= MOST_WAIT:
                raise ValueError(f"model '{name}': {why_not_loaded(e, name)}") from None
        finally:
            for bar in bars:
                bar.close()
        code = answer.response.status_code
        console.say(f"note: the Hugging Face hub answers HTTP {code}; asking again in {wait} s", sys.stderr)
        time.sleep(wait)


def _asked_to_wait(answer: Any) -> int:
    """The seconds that the hub asks to wait (an HfHubHTTPError); 0 if it does not say."""
    headers = answer.response.headers
    if (limit := parse_ratelimit_headers(headers)) and not limit.remaining:
        return limit.reset_in_seconds
    return int(after) if (after := headers.get("Retry-After", "")).isdecimal() else 0


def why_not_loaded(
    error: BaseException, name: str, kind: str = "model", instead: str = "model folder with --model DIR"
) -> str:
    """Why something on the hub can't be loaded, and what to do, in one line; for a data set "" if the hub is not why.

    Args:
        error: what huggingface_hub or datasets raised. name: OWNER/NAME. kind: model or dataset.
        instead: what local file or folder can be given.
    """
    for e in _chain(error):
        if isinstance(e, OSError) and e.errno in OF_THE_DISK:
            return (
                f"can't be written to the cache {constants.HF_HOME} ({e.strerror}); make room there, or set HF_HOME to "
                "another folder"
            )
    if answer := _refusal(error, name, kind):
        return _meaning(answer, name, kind)
    lost = (ConnectionError, TimeoutError, errors.HTTPError, *([FileNotFoundError] if kind == "model" else []))
    if any(isinstance(e, lost) for e in _chain(error)):
        return (
            f"no local {'folder' if kind == 'model' else 'file'} of this name, and the Hugging Face hub can't be "
            f"reached{' (HF_HUB_OFFLINE is set)' * constants.is_offline_mode()}; give a local {instead}, or try "
            "--demo, which needs no network"
        )
    return f"can't be loaded ({clipped(first_line(error))})" if kind == "model" else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _meaning(seen: Any, name: str, kind: str) -> str:
    """What the hub's answer (an HfHubHTTPError) means, and what to do, in one line."""
    code, wait = seen.response.status_code, _asked_to_wait(seen)
    when = f"in {wait} s" if wait else "later"
    url = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    local, log_in = "file" if kind == "dataset" else "folder", "log in (`hf auth login` or HF_TOKEN)"
    hub, unknown = "the Hugging Face hub", isinstance(seen, errors.RepositoryNotFoundError)
    meanings = (  # the first that is true
        (isinstance(seen, errors.GatedRepoError), f"access is restricted; accept the licence at {url}, then {log_in}"),
        (isinstance(seen, errors.RevisionNotFoundError), f"{hub} has no such revision of it"),
        (unknown, f"not on the Hugging Face hub, and no local {local}; if it is private, {log_in}"),
        (code == 401, f"{hub} wants a valid token (HTTP 401), and got none or a wrong one; {log_in}"),
        (code == 403, f"the token may not read it (HTTP 403); look at {url}, then {log_in} with one that may"),
        (code == 429, f"too many requests to {hub} (HTTP 429); try again {when}, or {log_in} to be allowed more"),
        (code >= 500, f"{hub} is not available (HTTP {code}); try again {when}"),
        (True, f"{hub} answers HTTP {code} ({clipped(seen, 80)})"),
    )
    return next(text for applies, text in meanings if applies)


def _refusal(error: BaseException, name: str, kind: str) -> Any:
    """The hub's answer (an HfHubHTTPError) that led to an error, or None."""
    answers = [e for e in _chain(error) if isinstance(e, errors.HfHubHTTPError)]
    seen = next((e for e in answers if not isinstance(e, errors.EntryNotFoundError)), None)
    if seen is None and kind == "dataset":  # datasets drops the cause, so ask again
        try:
            huggingface_hub.HfApi().auth_check(name, repo_type=kind)
        except (errors.HTTPError, OSError, ValueError) as e:
            return e if isinstance(e, errors.HfHubHTTPError) else None
    return seen


def _check_folder(folder: Path, name: str) -> None:
    """Check a model's files before any of them is passed to a library.

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
    layers = [abs(v) for k, v in config.items() if re.fullmatch("(num|n)(_hidden)?_layers?", k) and isinstance(v, int)]
    if (most := max(layers, default=0)) > 1000 and most > len(weight_shapes(folder)):
        raise ValueError(f"model '{name}': config.json says {clipped(most, 20)} layers, more than there are weights")


def _refuse_quantization(config: dict[str, Any], name: str) -> None:
    """Raise ValueError if config.json names another quantization than bitsandbytes' 4 bits.

    The weights tell whether they are in 4 bits: the config.json of a dequantised model may still say so.
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
