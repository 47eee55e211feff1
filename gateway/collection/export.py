"""What was collected, with what was said of it → the lines that `deepseek-triton learn` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepseek_triton.gateway.collection.files import CollectionFiles
from deepseek_triton.gateway.collection.lines import AnswerId

KEPT = ("id", "model", "version", "time")  # of a line beside its text: no pseudonym leaves the collection


@dataclass(frozen=True)
class Selection:
    """liked: only answers labelled good or corrected. whole: only those that ended by themselves. model: ""; any."""

    liked: bool = False
    whole: bool = False
    model: str = ""

    def takes(self, line: dict[str, Any], said: dict[str, Any]) -> bool:
        """Whether an answer is exported. said: the feedback on it; {}: none."""
        is_corrected = bool(said.get("correction"))
        return (
            (not self.liked or is_corrected or said.get("label") == "good")
            and (not self.whole or is_corrected or line["finish_reason"] == "stop")
            and self.model in ("", line["model"], line["version"])
        )


def exported(files: CollectionFiles, selection: Selection) -> Iterator[dict[str, Any]]:
    """The lines; `label` tells what was said last. A corrected answer stands as it should have been, and is good."""
    feedback = {AnswerId.of(line): line for line in files.read("feedback")}
    for line in files.read("answers"):
        said = feedback.get(AnswerId.of(line), {})
        if selection.takes(line, said):
            yield _line(line, said)


def _line(line: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    told = {name: line[name] for name in KEPT}
    correction = said.get("correction") or ""
    if correction and "messages" in line:
        corrected = [*line["messages"][:-1], {"role": "assistant", "content": correction}]
        return {**told, "label": "good", "messages": corrected}
    if correction and line["prompt_chars"] is not None:
        return {**told, "label": "good", "text": line["text"][: line["prompt_chars"]] + correction}
    form = "messages" if "messages" in line else "text"
    return {**told, "label": said.get("label"), form: line[form]}
