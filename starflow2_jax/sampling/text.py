"""Tokens to text as they come."""

from collections.abc import Callable, Sequence

from starflow2_jax.errors import UserError


def check_stop(stop: Sequence[str]) -> None:
    """Raises UserError for a stop string that is empty, or that no reply can hold."""
    if not all(stop):
        raise UserError("a stop string is empty")
    for end in stop:
        try:
            end.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the stop string {end!r} is no text of Unicode: {error}") from error


def until(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the stop strings; the whole text where there is none."""
    return min((text.split(end, 1)[0] for end in stop), key=len, default=text)


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    most = max((len(end) for end in stop), default=1) - 1
    sizes = range(min(most, len(text)), 0, -1)
    return next((n for n in sizes if any(end.startswith(text[-n:]) for end in stop)), 0)


class TextPieces:
    """The text of a piece of a reply, token after token, without blanks at either end.

    Bytes of one character may come in several tokens: what is given out is complete. A stop string
    and what follows it are not given out, nor what may become one while it may.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """`decode`: token ids to text; `stop`: strings that end a reply."""
        self._decode = decode
        self._stop = stop
        self._tokens: list[int] = []
        self._shown = ""

    def _unseen(self, last: bool) -> str:
        whole = self._decode(self._tokens)
        text = until(whole, self._stop)
        if text == whole and not last:
            if text.rstrip(" ").endswith("\ufffd"):
                return ""
            text = text[: len(text) - _begun(text, self._stop)]
        text = text.strip(" ")
        return text[len(self._shown) :] if text.startswith(self._shown) else ""

    def more(self, tokens: Sequence[int]) -> str:
        """What these tokens add to what was given out; may be nothing yet."""
        self._tokens += tokens
        text = self._unseen(last=False)
        self._shown += text
        return text

    def end(self) -> str:
        """What was held back; the next tokens are another piece."""
        text = self._unseen(last=True)
        self._tokens, self._shown = [], ""
        return text
