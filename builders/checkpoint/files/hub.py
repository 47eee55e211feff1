"""A model's name on Hugging Face → its files here, by `huggingface_hub` and its cache; only those that are read."""

from __future__ import annotations

import glob
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.files.gguf_parts import PART
from deepseek_triton.builders.checkpoint.files.hub_cache import MODEL_ID, PREFIX, names_model
from deepseek_triton.builders.checkpoint.files.weight_files import INDEX, OTHER_WEIGHTS, PICKLES, indexed_files
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.ensemble.artefacts.tokenizer_files import FILES, TEMPLATES
from deepseek_triton.ensemble.text.errors import one_line
from deepseek_triton.extras import install_command

SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.model", "tekken.json", *FILES)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

Report = Callable[[str, int, int], None]


def local_checkpoint(
    source: Path, revision: str | None = None, report: Report = lambda what, done, total: None
) -> Path:
    """The file or directory `source`, or where there is none the download of the model that it names on Hugging Face.

    Args:
        source: a path; or ORG/NAME, or ORG/NAME/FILE.gguf, any of whose parts stands for all.
        revision: a branch, a tag or a commit of the model on Hugging Face; None: `main`.
        report: called with "download", the bytes that have come and those that will.

    Raises:
        BuildError: a revision of what is here; huggingface_hub is not installed, can't reach the Hub, or is refused.
        CheckpointError: the Hub has no such model, revision or file. UnsupportedError: its weights can't be read here.
    """
    match = MODEL_ID.fullmatch(str(source))
    if match is None or not names_model(source):
        if revision is not None:
            raise BuildError(f"revision is for a model on Hugging Face, as ORG/NAME; {source} is a path")
        return source
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise BuildError(
            f"{source} does not exist; to download the model of that name from Hugging Face, first run: "
            f"{install_command('hub')}"
        ) from error
    return _Download(huggingface_hub, match[1], revision or "main", report).path(match[2])


class _Download:
    """One model at one revision."""

    def __init__(self, hub: Any, model_id: str, revision: str, report: Report) -> None:
        self._hub, self._id, self._revision, self._report = hub, model_id, revision, report

    def path(self, gguf: str | None) -> Path:
        """The snapshot with all that is needed, or in it the file `gguf`."""
        errors = self._hub.errors
        try:
            info = self._hub.HfApi().model_info(self._id, revision=self._revision)
            files = [file.rfilename for file in info.siblings or ()]
            directory = self._fetch(self._needed(info.sha, files, gguf))
        except BuildError:
            raise
        except errors.GatedRepoError as error:
            raise BuildError(
                f"{self._id} is gated: accept its terms at https://huggingface.co/{self._id}, then run: hf auth login"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{self._id} has no revision {self._revision!r} on Hugging Face") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{self._id} is neither a path here nor a model on Hugging Face that may be read; check the name, or "
                "for a private one run: hf auth login"
            ) from error
        except Exception as error:  # whatever the Hub's HTTP library raises: its names changed with each release
            directory = self._cached(error)
        return directory if gguf is None else directory / gguf

    def _cached(self, error: Exception) -> Path:
        """The snapshot that an earlier download left; whether it is complete is seen when it is opened."""
        cache = Path(self._hub.constants.HF_HUB_CACHE) / (PREFIX + self._id.replace("/", "--"))
        reference = cache / "refs" / self._revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else self._revision
        if (directory := cache / "snapshots" / commit).is_dir():
            return directory
        raise BuildError(
            f"{self._id} is not in the cache, and Hugging Face can't be reached ({one_line(error)}); download it where "
            f"it can, with: hf download {self._id}, and give the directory"
        ) from error

    def _fetch(self, names: Sequence[str]) -> Path:
        return Path(
            self._hub.snapshot_download(
                self._id,
                revision=self._revision,  # by its name, which the cache then knows offline
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=_forwarding(self._report),
            )
        )

    def _needed(self, commit: str, files: Sequence[str], gguf: str | None) -> list[str]:
        """Those of the model's files that are read here."""
        if gguf is not None:
            return self._gguf_parts(files, gguf)
        names = [name for name in files if name in SMALL_FILES or name.startswith(f"{TEMPLATES}/")]
        if INDEX in files:
            index = Path(self._hub.hf_hub_download(self._id, INDEX, revision=commit))
            return [*names, INDEX, *indexed_files(index)]
        weights = [name for name in files if "/" not in name and name.endswith(".safetensors")]
        weights = [name for name in weights if not name.startswith(OTHER_WEIGHTS)]
        if weights:
            return names + weights
        if all(name in files for name in ADAPTER_FILES):
            return list(ADAPTER_FILES)
        if ggufs := [name for name in files if name.endswith(".gguf")]:
            raise CheckpointError(
                f"{self._id} has GGUF files; name one of them, as {self._id}/{ggufs[0]}; it has {', '.join(ggufs[:20])}"
            )
        if pickles := [name for name in files if name.endswith(PICKLES)]:
            raise UnsupportedError(
                f"{self._id} has pickled weights alone ({pickles[0]}), which can run code when they are loaded; look "
                "for a revision of it with safetensors (--revision refs/pr/N), or convert it with save_pretrained"
            )
        raise CheckpointError(f"{self._id} has no weights on Hugging Face: no safetensors and no GGUF")

    def _gguf_parts(self, files: Sequence[str], gguf: str) -> list[str]:
        if gguf not in files:
            others = [name for name in files if name.endswith(".gguf")]
            raise CheckpointError(f"{self._id} has no {gguf}; its GGUF files: {', '.join(others[:20]) or 'none'}")
        match = PART.fullmatch(gguf)
        if match is None:
            return [gguf]
        return [name for name in files if (other := PART.fullmatch(name)) and other.group(1, 3) == match.group(1, 3)]


def _forwarding(report: Report) -> Any:
    """A class of progress bars that draw nothing, but report the bytes of all files together."""
    from tqdm import tqdm

    bars: list[Any] = []

    class Forwarding(tqdm):  # type: ignore[misc]  # tqdm is untyped
        """As huggingface_hub makes them: several may count the same bytes on their way."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "file": io.StringIO(), "disable": False})
            if self.unit == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> Any:
            drawn = super().update(n)
            total = max((int(bar.total or 0) for bar in bars), default=0)
            if total:
                report("download", min(total, max(int(bar.n) for bar in bars)), total)
            return drawn

    return Forwarding
