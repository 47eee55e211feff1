"""The tokens that end a text: those of the configuration, the tokenizer's own, and the chat template's end of turn."""

from __future__ import annotations

import json

from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.text.errors import TextError
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

# What the template is given; the second is looked for in what it makes of them.
QUESTION, ANSWER = "question-of-the-user", "answer-of-the-model"


def end_ids(spec: ModelSpec, tokenizer: Tokenizer, source: str) -> tuple[int, ...]:
    """The ids that end a text of the model; source: the checkpoint, for the message.

    An id that the model has no row for is never chosen, and is left out.

    Raises:
        CheckpointError: there are none.
    """
    found = [*spec.eos_token_ids, tokenizer.eos_id, end_of_turn(tokenizer)]
    ids = tuple(dict.fromkeys(index for index in found if index is not None and index < spec.vocab_size))
    if not ids:
        raise CheckpointError(
            f"{source} names no token that ends a text: set eos_token_id in config.json or generation_config.json, or "
            "eos_token in tokenizer_config.json"
        )
    return ids


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id of the token that the chat template writes after an answer; None: it has no template, or writes none.

    The token that opens a message is none: some templates write it after the last message too.
    """
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    if not tokenizer.has_chat_template:
        return None
    try:
        prompt = tokenizer.chat_prompt(json.dumps({"messages": messages, "add_generation_prompt": False})).text
    except TextError:  # some templates take one form of messages only
        return None
    _, found, after = prompt.partition(ANSWER)
    if not found:
        return None
    token = tokenizer.leading_token(after.lstrip())
    if token is None or (token != tokenizer.eos_id and token == _opener(tokenizer, prompt.partition(QUESTION)[0])):
        return None
    return token


def _opener(tokenizer: Tokenizer, text: str) -> int | None:
    """The first added token of `text`, which a template writes before the first message; a text's BOS aside."""
    ids = tokenizer.encode_continuation(text).tolist()
    return next((index for index in ids if tokenizer.is_added(index) and index != tokenizer.bos_id), None)
