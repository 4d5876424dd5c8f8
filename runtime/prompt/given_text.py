"""Text that is to be spoken as it is given."""

from __future__ import annotations

from ..errors import PromptError
from .tokenizer import TextCodec


def ids_to_say(text: object, codec: TextCodec) -> list[int]:
    """Token ids of a reply that is given.

    Raises:
        PromptError: no text, or text that nobody could say: empty, not valid Unicode, or with a control token in it.
    """
    if not isinstance(text, str):
        raise PromptError(f"the text to say is a {type(text).__name__}; a string was expected")
    if not text.strip():
        raise PromptError("the text to say is empty; give it some words")
    marker = codec.marker_in(text)
    if marker is not None:
        raise PromptError(
            f"the text to say holds {marker!r}, a control token of the model, which has no sound; leave it out"
        )
    return codec.encode(text)
