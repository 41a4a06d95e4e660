"""What leaves home: a model card in each folder that is saved, and a push to the Hugging Face hub where asked for.

A card says what a stranger needs: which base, at which revision and in how many bits, which data, which options, what
was measured, how to load it. Of local models and data it gives the names, not where they were.

A push is private unless asked otherwise, and never makes public what is there: a public repository is refused without
--public. The token is huggingface_hub's own business (HF_TOKEN, or `hf auth login`).
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import __version__
from .adapter import AdapterConfig
from .checkpoint import is_run, read_metrics, read_record
from .config import clipped, redacted, refuse_secrets
from .evaluate import MEASURES, beside
from .reading import FILE_KINDS

CARD = "README.md"
Record = Mapping[str, Any]  # a run's config.json

LOAD_ADAPTER = """\
With peft, on the base as it was trained on ({stands}`FOLDER` is this folder or repository):

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{more}

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype=torch.{dtype}{quantized})
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

With qlora_min: `qlora-min chat --adapter FOLDER`, and `--model NAME` where the base lies elsewhere;
`qlora-min merge --adapter FOLDER --output-dir merged` makes an ordinary checkpoint of it.
"""
LOAD_MERGED = """\
With transformers (`FOLDER` is this folder or repository):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


# ---------------------------------------------------------------------------------------------------------------------
# Model cards
# ---------------------------------------------------------------------------------------------------------------------


def adapter_card(config: AdapterConfig, record: Record, before: dict | None, best: dict | None, best_step: int) -> str:
    """The card of an adapter: what its run was, and the held-out results without and with it, if there are any."""
    four = config.quantization != "none"
    weights = f"weights in 4-bit {config.quantization.upper()}, doubly quantised" if four else "unquantised weights"
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[record["precision"]]
    load = LOAD_ADAPTER.format(
        dtype=dtype, more=", BitsAndBytesConfig" if four else "",
        base=config.base if is_hub_id(config.base) else "BASE",
        stands="" if is_hub_id(config.base) else "`BASE` is the base, ",
        revision=f', revision="{config.revision}"' if config.revision else "",
        quantized=", quantization_config=BitsAndBytesConfig(\n    load_in_4bit=True, "
        f'bnb_4bit_quant_type="{config.quantization}", bnb_4bit_use_double_quant=True, '
        f"bnb_4bit_compute_dtype=torch.{dtype})" if four else "",
    )  # fmt: skip
    return _card(
        config, record, {"library_name": "peft", "tags": ["qlora", "lora"]},
        f"A LoRA adapter for {named(config.base)}",
        f"Rank {config.rank}, alpha {config.alpha:g}, on {', '.join(config.targets)}; trained with qlora_min "
        f"{__version__} on the base's {weights}, and to be used on those.",
        [_results(before, best, best_step), *_training(record), f"## Loading\n\n{load}"],
    )  # fmt: skip


def merged_card(config: AdapterConfig, adapter: Path, how: str) -> str:
    """The card of a merged checkpoint; `how` says onto what it was merged, and what the check measured."""
    record: Record = {}
    sections = []
    if is_run(adapter.parent):
        record = read_record(adapter.parent)
        end = next((e for e in reversed(read_metrics(adapter.parent)) if e["event"] == "end"), {})
        sections = [_results(end.get("before"), end.get("best"), end.get("best_step", 0)), *_training(record)]
    return _card(
        config, record, {"library_name": "transformers", "tags": ["qlora"]}, f"{named(config.base)}, fine-tuned",
        f"A LoRA adapter (rank {config.rank}, alpha {config.alpha:g}, on {', '.join(config.targets)}), merged into its "
        f"base by qlora_min {__version__}: {how}.",
        [*sections, f"## Loading\n\n{LOAD_MERGED}"],
    )  # fmt: skip


def _card(config: AdapterConfig, record: Record, front: dict, title: str, text: str, sections: list[str]) -> str:
    base = config.base if is_hub_id(config.base) else None
    options = record.get("options", {})
    data = [n for n in [*options.get("dataset", []), *options.get("eval_dataset", [])] if is_hub_id(n)]
    front = {"base_model": base, **front, "pipeline_tag": "text-generation", "datasets": list(dict.fromkeys(data))}
    lines = [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in front.items() if v]  # JSON is YAML
    about = f"Base: {f'[{base}](https://huggingface.co/{base})' if base else named(config.base)}"
    about += f", revision `{config.revision}`" if config.revision else ""
    about += f", fingerprint `{config.fingerprint}`" if config.fingerprint else ""
    parts = ["\n".join(["---", *lines, "---"]), f"# {title}", text, about + ".", *sections]
    return redacted("\n\n".join(parts).rstrip() + "\n")


def _results(before: dict | None, best: dict | None, step: int) -> str:
    if not before or not best:
        return "## Results\n\nNone: no rows were held out."
    rows = [f"## Results\n\nOn {best['rows']:,} held-out rows, after {step:,} optimizer steps:\n",
            "| | base | with the adapter |", "|---|---|---|"]  # fmt: skip
    for label, key, form in MEASURES:
        if best.get(key) is not None:
            known = f" ({beside(best)})" if key == "option_accuracy" else ""
            rows.append(f"| {label}{known} | {form.format(before[key])} | {form.format(best[key])} |")
    return "\n".join(rows)


def _training(record: Record) -> list[str]:
    """The sections on data and options: the latter as a file for `qlora-min train --config`."""
    data = [f"- {named(name)}: {what}" for name, what in record["files"].items()]
    options = {k: [named(n) for n in v] if k in ("dataset", "eval_dataset") else named(v) if k == "model" else v
               for k, v in record["options"].items() if k != "output_dir" and v is not None and v != []}  # fmt: skip
    toml = "\n".join(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in options.items())
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return [
        "## Data\n\n" + "\n".join(data) + f"\n\nThe sha256 of all rows as tokens: `{record['data']['sha256']}`.",
        f"## Options\n\n```toml\n{toml}\n```\n\nComputed in {record['precision']}; {versions}.",
    ]


def is_hub_id(name: str) -> bool:
    """OWNER/NAME, and no file: such names are the hub's, since those of local models are absolute in an adapter."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and Path(name).suffix not in FILE_KINDS


def named(name: str) -> str:
    """A hub id as it is, a local file or folder without where it lies; what stands behind, " (held out)", stays."""
    where, held_out, _ = name.partition(" (held out)")
    return (where if is_hub_id(where) else re.split(r"[/\\]", where.rstrip("/\\"))[-1]) + held_out


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------


def check_push(repo: str, public: bool, base: str | None = None) -> None:
    """Ask the hub, before any work, whether a push to OWNER/NAME can succeed; nothing is changed there.

    Args:
        base: of an adapter that is to be pushed; there is a note if its place on this machine would be pushed with it.

    Raises:
        ValueError: no such name is possible, there is no token or not one that may write there, the hub can't be
            reached, or the repository is public already and `public` is not asked for.
    """
    refuse_secrets(repo, "--push-to-hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo if repo.count("/") == 1 else "")
    except HFValidationError:
        raise ValueError(
            f"--push-to-hub: got '{clipped(repo)}', expected OWNER/NAME, of letters, digits, '-', '_' and '.'"
        ) from None
    with _reaching(repo, "nothing has been done yet; check network and token, or leave the option out"):
        me = HfApi().whoami()
        owners = [me["name"], *(org["name"] for org in me.get("orgs", []))]
        if repo.split("/")[0] not in owners:
            raise _refusal(repo, f"the token is of {', '.join(owners)}; expected one of these as OWNER")
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise _refusal(repo, "the token may only read; make one that may write")
        with suppress(RepositoryNotFoundError):  # or else it will be made
            _refuse_public(repo, HfApi().model_info(repo).private, public)
    if base and Path(base).is_dir():
        where = Path(base).resolve()
        print(f"note: the adapter will name its base as '{where}', and those who load it must give theirs")


def push(folder: Path, repo: str, public: bool) -> str:
    """Push a folder to OWNER/NAME, which is made if need be; a repository that holds something gets a new commit.

    Returns:
        where it is now.

    Raises:
        ValueError: the hub can't be reached, refuses, or has the repository public where `public` is not asked for. The
            folder is as it was, and the message says how to push it later.
    """
    from huggingface_hub import HfApi

    api, later = HfApi(), ["hf", "upload", repo, str(folder), ".", *([] if public else ["--private"])]
    with _reaching(repo, f"'{folder}' is whole; push it later with: {shlex.join(later)}"):
        api.create_repo(repo, private=not public, exist_ok=True)
        info = api.model_info(repo)
        _refuse_public(repo, info.private, public)
        if held := len({f.rfilename for f in info.siblings or ()} - {".gitattributes"}):
            print(f"{repo} holds {held} files: this push is a new commit on top, what they were stays in its history")
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Pushed by qlora_min").repo_url.url


def _refuse_public(repo: str, private: bool | None, public: bool) -> None:
    if not private and not public:
        raise _refusal(repo, "that repository is public; add --public to push there, or choose another")


def _refusal(repo: str, why: str) -> ValueError:
    return ValueError(f"--push-to-hub {repo}: {why}")


@contextmanager
def _reaching(repo: str, advice: str) -> Iterator[None]:
    """Whatever huggingface_hub or the network raise is a ValueError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
        return
    except LocalTokenNotFoundError:
        why = "there is no token; log in with `hf auth login` or set HF_TOKEN"
    except HfHubHTTPError as e:
        why = f"the hub refuses ({clipped(e.server_message or e)})"
    except ValueError:
        raise
    except Exception as e:  # of whichever HTTP library it uses
        why = f"the Hugging Face hub can't be reached ({clipped(e)})"
    raise _refusal(repo, f"{why}; {advice}")
