"""Finding a model in a local folder or on the hub, and checking its files before any library reads them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from .files import check_links, read_json
from .text import clipped, refuse_secrets, shown
from .weights import weight_shapes

# The files of a model to download: weights only as safetensors (no pickles), no code.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]


def find_model(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """(folder, revision) of a local model folder, or of a model on the hub, which is downloaded if it is not cached.

    Args:
        revision: a commit or branch on the hub; default the newest commit.

    Returns:
        The folder, and the commit on the hub (None for a local folder).

    Raises:
        ValueError: there is no such model, its files are not safe to read, or the hub can't be reached.
    """
    refuse_secrets(name, "model")
    path = Path(name)
    if path.is_dir():
        _check_folder(path, name)
        return path, None
    if path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ValueError(f"model '{name}': no such folder; expected a local model folder or a hub id like OWNER/NAME")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise ValueError(f"model '{name}': not on the Hugging Face hub (or private), and no local folder") from None
    except HFValidationError:
        raise ValueError(f"model '{name}': no local folder, and no valid hub id") from None
    except (LocalEntryNotFoundError, OSError):
        raise ValueError(
            f"model '{name}': no local folder of this name, and the Hugging Face hub can't be reached; "
            "give a local model folder with --model DIR, or try --demo, which needs no network"
        ) from None
    _check_folder(folder, name)
    return folder, folder.name


def _check_folder(folder: Path, name: str) -> None:
    """Check the files of a model that are not safe to pass to a library.

    Raises:
        ValueError: a file links out of the folder, config.json is unreadable, the architecture would need the model's
            own code, or config.json states more layers than there are weights (building them would take forever).
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
    layers = [v for k, v in config.items() if re.fullmatch("(num|n)(_hidden)?_layers?", k) and isinstance(v, int)]
    if any(abs(n) > 1000 for n in layers) and max(map(abs, layers)) > len(weight_shapes(folder)):
        raise ValueError(
            f"model '{name}': config.json says {clipped(max(layers), 20)} layers, more than there are weights"
        )


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Convert any error in this context to a ValueError of one line: damaged files cause errors of every type."""
    try:
        yield
    except Exception as e:
        first = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise ValueError(f"{what} ({clipped(first)})") from None
