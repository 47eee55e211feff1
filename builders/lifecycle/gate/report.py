"""The gate's report: verdicts with reasons, as JSON that `promote` reads and as one HTML file for people."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically

FORMAT = 1
# What every verdict is about, where no build was judged.
JUDGED = "the checkpoint as transformers runs it, not what a build makes of it"
JSON_NAME, HTML_NAME = "report.json", "report.html"
STYLE = (
    "body{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}"
    "td,th{border:1px solid #bbb;padding:.4rem;text-align:left;vertical-align:top}.yes{color:#060}.no{color:#b00}"
    "pre{white-space:pre-wrap;margin:0}"
)


@dataclass(frozen=True)
class LimitVerdict:
    """One limit. measured, base: of the candidate and the base, as text. why: one sentence."""

    name: str
    passed: bool
    measured: str
    base: str
    limit: str
    why: str


@dataclass(frozen=True)
class Report:
    """What the gate found. candidate, base: name and sha256 of each. data: held-out examples and SHA-256 of each file.

    not_checked: sections without a limit. at: when, in UTC. judged: what of the candidate was measured. built: the
    fields of the `JudgedBuild`, empty if none was judged.
    """

    candidate: dict[str, str]
    base: dict[str, str]
    verdicts: tuple[LimitVerdict, ...]
    data: dict[str, dict[str, Any]]
    not_checked: tuple[str, ...]
    limits_sha256: str
    at: str
    judged: str = JUDGED
    built: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(verdict.passed for verdict in self.verdicts)

    def save(self, directory: Path) -> None:
        """Write report.json and report.html.

        Raises:
            BuildError: they can't be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f"{directory}: {error.strerror}; give another --report") from error
        write_atomically(directory / HTML_NAME, self.to_html().encode(), BuildError)
        text = json.dumps({"format": FORMAT, "passed": self.passed, **asdict(self)}, indent=1, ensure_ascii=False)
        write_atomically(directory / JSON_NAME, f"{text}\n".encode(), BuildError)

    def to_html(self) -> str:
        """A page that needs nothing else."""
        rows = "".join(
            f"<tr><td>{_escape(one.name)}</td><td class={'yes' if one.passed else 'no'}>"
            f"{'passed' if one.passed else 'failed'}</td><td><pre>{_escape(one.measured)}</pre></td>"
            f"<td><pre>{_escape(one.base)}</pre></td><td>{_escape(one.limit)}</td><td>{_escape(one.why)}</td></tr>"
            for one in self.verdicts
        )
        told = "passed" if self.passed else "did not pass"
        data = "".join(
            f"<li>{_escape(name)}: {one['examples']} held-out examples of a file with SHA-256 "
            f"<code>{_escape(one['sha256'])}</code></li>"
            for name, one in self.data.items()
        )
        unchecked = (
            f"<p>No limit was given for: {_escape(', '.join(self.not_checked))}.</p>" if self.not_checked else ""
        )
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>Gate: {told}</title><style>{STYLE}</style>"
            f"<h1>{_escape(self.candidate['name'])} <span class={'yes' if self.passed else 'no'}>{told}</span></h1>"
            f"<p>Against {_escape(self.base['name'])}, {_escape(self.at)}. Judged: {_escape(self.judged)}.</p>"
            "<table><tr><th>Limit of<th>Verdict<th>Candidate<th>Base<th>Limit<th>Why</tr>"
            f"{rows}</table>{unchecked}<ul>{data}"
            f"<li>candidate's tensors: <code>{_escape(self.candidate['sha256'])}</code></li>"
            f"<li>base's tensors: <code>{_escape(self.base['sha256'])}</code></li></ul></html>\n"
        )


def require_passed(path: Path, candidate_sha256: str) -> Mapping[str, Any]:
    """The report at `path`, if it says that this candidate passed.

    Raises:
        BuildError: it can't be read, is of another candidate, or says that it failed.
    """
    path = path / JSON_NAME if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}; run `deepseek-triton gate` first") from error
    except ValueError as error:
        raise BuildError(f"{path} is not a gate's report; run `deepseek-triton gate` again") from error
    try:
        if values["format"] != FORMAT:
            raise BuildError(f"{path} has format {values['format']}, this version reads {FORMAT}: run the gate again")
        found, verdicts = values["candidate"]["sha256"], values["verdicts"]
        failed = [one["name"] for one in verdicts if one["passed"] is not True]
        if found != candidate_sha256:
            raise BuildError(
                f"{path} is about a candidate with SHA-256 {found[:12]}…, this one has {candidate_sha256[:12]}…: "
                "run the gate on what is to be promoted"
            )
        if failed or not verdicts or values["passed"] is not True:
            raise BuildError(f"{path} says that the candidate didn't pass ({', '.join(failed)}): it is not promoted")
    except (KeyError, TypeError) as error:
        raise BuildError(f"{path} is not a gate's report; run `deepseek-triton gate` again") from error
    report: Mapping[str, Any] = values
    return report


def _escape(text: str) -> str:
    return html.escape(text)
