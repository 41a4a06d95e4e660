"""Pushing to the Hugging Face hub: to a private repository unless --public; a private one never becomes public.

The token is left to huggingface_hub (HF_TOKEN, or `hf auth login`).
"""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..system.text import clipped, refuse_secrets, refusing
from .options import Emit, Parser


def hub_options(parser: Parser, what: str) -> None:
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help=f"push the {what} to this private repository, too")
    parser.add_argument("--public", action="store_true", help="for --push-to-hub: the repository may be public")


def push_if_asked(folder: Path, args: argparse.Namespace, emit: Emit) -> None:
    """Push a folder, and print the address of the repository."""
    if args.push_to_hub:
        url = push(folder, args.push_to_hub, args.public)
        print(f"pushed to {url} ({'public' if args.public else 'private'})")
        emit({"event": "push", "url": url, "public": args.public})


def check_repository(args: argparse.Namespace, base: str | None = None) -> None:
    """Check the repository to push to, if any: the hub is asked, before any work, whether a push can succeed.

    Nothing is changed on the hub.

    Args:
        base: the base of an adapter that is to be pushed. If it is a folder, a note says that its path is pushed, too.

    Raises:
        ValueError: the name is invalid, there is no token or it may not write there, the hub can't be reached, or the
            repository is public and --public is not given.
    """
    if args.public and not args.push_to_hub:
        raise ValueError("--public needs --push-to-hub OWNER/NAME (see --help)")
    if not (repo := args.push_to_hub):
        return
    refuse_secrets(repo, "--push-to-hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    if "/" not in repo:
        raise ValueError(f"--push-to-hub: got '{clipped(repo)}', expected OWNER/NAME")
    with refusing(f"--push-to-hub: got '{clipped(repo)}'", "expected OWNER/NAME"):
        validate_repo_id(repo)
    with _reaching(repo, "nothing has been done yet; check network and token, or leave the option out"):
        me = HfApi().whoami()
        owners = [me["name"], *(org["name"] for org in me.get("orgs", []))]
        if repo.split("/")[0] not in owners:
            raise _refusal(repo, f"the token is of {', '.join(owners)}; expected one of these as OWNER")
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise _refusal(repo, "the token may only read; make one that may write")
        with suppress(RepositoryNotFoundError):  # it will be created
            _refuse_public(repo, HfApi().model_info(repo).private, args.public)
    if base and Path(base).is_dir():
        path = Path(base).resolve()
        print(f"note: the adapter will name its base as '{path}', and those who load it must give theirs")


def push(folder: Path, repo: str, public: bool) -> str:
    """Push a folder to OWNER/NAME as one commit; the repository is created if it does not exist.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: the hub can't be reached or refuses, or the repository is public and `public` is False. The folder
            is unchanged, and the message says how to push it later.
    """
    from huggingface_hub import HfApi

    api, later = HfApi(), ["hf", "upload", repo, str(folder), ".", *([] if public else ["--private"])]
    with _reaching(repo, f"'{folder}' is whole; push it later with: {shlex.join(later)}"):
        api.create_repo(repo, private=not public, exist_ok=True)
        info = api.model_info(repo)
        _refuse_public(repo, info.private, public)
        if held := len({f.rfilename for f in info.siblings or ()} - {".gitattributes"}):
            print(f"{repo} holds {held} files: this push is a new commit on top; its history keeps them")
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Pushed by qlora_min").repo_url.url


def _refuse_public(repo: str, private: bool | None, public: bool) -> None:
    if not private and not public:
        raise _refusal(repo, "that repository is public; add --public to push there, or choose another")


def _refusal(repo: str, why: str) -> ValueError:
    return ValueError(f"--push-to-hub {repo}: {why}")


@contextmanager
def _reaching(repo: str, advice: str) -> Iterator[None]:
    """Turn whatever huggingface_hub or the network raises into a ValueError of one line."""
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
    except Exception as e:  # of the HTTP library
        why = f"the Hugging Face hub can't be reached ({clipped(e)})"
    raise _refusal(repo, f"{why}; {advice}")
