"""Locate a checkpoint: a local folder, or a download from Hugging Face or ModelScope."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from omniport.runtime.errors import CheckpointError, ExportError
from omniport.runtime.system.progress import Say

_PATTERNS = ["*.json", "*.txt", "*.safetensors", "*.jinja", "spk_dict.pt"]
_MODELSCOPE = "modelscope:"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(spec: str | os.PathLike[str], progress: Say | None = None) -> tuple[str, Path]:
    """The checkpoint's name and its local folder, downloaded when ``spec`` is an id that is not a folder.

    Raises:
        CheckpointError: no such folder or id, no access, no network, or a download that failed.
        ExportError: ModelScope was asked for and is not installed.
    """
    text = os.fspath(spec)
    path = Path(text).expanduser()
    if path.is_dir():
        return path.resolve().name, path
    if path.exists():
        raise CheckpointError(f"{text} is a file; expected a checkpoint folder, or an id such as Qwen/Qwen2.5-Omni-3B.")
    from_modelscope = isinstance(spec, str) and text.startswith(_MODELSCOPE)
    repo = text.removeprefix(_MODELSCOPE) if from_modelscope else text
    if not isinstance(spec, str) or not _ID.fullmatch(repo):
        raise CheckpointError(
            f"no folder {text}. Give a checkpoint folder, a Hugging Face id (Qwen/Qwen2.5-Omni-3B) or a ModelScope id "
            "(modelscope:Qwen/Qwen2.5-Omni-3B)."
        )
    if progress is not None:
        progress(f"fetching {repo} from {'ModelScope' if from_modelscope else 'Hugging Face'}")
    return text, _from_modelscope(repo) if from_modelscope else _from_hugging_face(repo)


def _from_hugging_face(repo: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_PATTERNS))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated on Hugging Face. Accept its terms on its page, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"Hugging Face has no model {repo!r} that you can see. Check the spelling; if it is private, run "
            "`hf auth login` first."
        ) from error
    # LocalEntryNotFoundError: nothing cached and no connection. The HTTP library's own errors share no base with ours.
    except Exception as error:
        raise CheckpointError(
            f"cannot download {repo} from Hugging Face and it is not complete in the local cache "
            f"({type(error).__name__}: {_first_line(error)}). Check the network and the free disk space, or give the "
            "path of a folder that holds the checkpoint."
        ) from error


def _from_modelscope(repo: str) -> Path:
    try:
        modelscope = importlib.import_module("modelscope")
    except ImportError as error:
        raise ExportError("ModelScope ids need the modelscope package: pip install modelscope") from error
    try:
        return Path(modelscope.snapshot_download(repo, allow_patterns=_PATTERNS))
    except Exception as error:
        raise CheckpointError(
            f"cannot download {repo} from ModelScope ({type(error).__name__}: {_first_line(error)}). Check the "
            "spelling, the network and the free disk space, or give the path of a folder that holds the checkpoint."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else "no message"
