"""The body of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from deepseek_triton.gateway.apis.wire.sampling import SamplingBody
from deepseek_triton.gateway.apis.wire.validation import field_error

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _prompt_tag(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    return "<ids>" if any(isinstance(part, int | list) for part in value) else "<texts>"


def _refuse_ids(value: Any) -> Any:
    raise ValueError("prompts of token ids are not supported: send text")


Text = Annotated[str, Field(min_length=1)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[list[str], BeforeValidator(_refuse_ids), Tag("<ids>")],
    Discriminator(_prompt_tag),
]


class CompletionBody(SamplingBody):
    """A completion of one or several texts. store (not OpenAI's here): whether its answer may be collected."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"logit_bias": ({},), "suffix": ("",)}

    prompt: Prompt
    best_of: int | None = Field(default=None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    store: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> CompletionBody:
        if self.best_of not in (None, self.n or 1):
            raise field_error("best_of", f"best_of is not supported, except as n, got {self.best_of}")
        if self.echo and self.logprobs is not None:
            raise field_error("logprobs", "logprobs is not supported with echo: those of the prompt aren't computed")
        return self

    @property
    def prompts(self) -> list[str]:
        """The texts, of which there may be one."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt
