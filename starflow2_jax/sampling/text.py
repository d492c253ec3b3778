"""Tokens to text as they come."""

from collections.abc import Callable, Sequence


class TextPieces:
    """The text of a piece of a reply, token after token.

    Bytes of one character may come in several tokens: what is given out is complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode`: token ids to text."""
        self._decode = decode
        self._tokens: list[int] = []
        self._shown = ""

    def _unseen(self) -> str:
        text = self._decode(self._tokens)
        return text[len(self._shown) :] if text.startswith(self._shown) else ""

    def more(self, tokens: Sequence[int]) -> str:
        """What these tokens add to what was given out; may be nothing yet."""
        self._tokens += tokens
        text = self._unseen()
        if text.endswith("\ufffd"):
            return ""
        self._shown += text
        return text

    def end(self) -> str:
        """What was held back; the next tokens are another piece."""
        text = self._unseen()
        self._tokens, self._shown = [], ""
        return text
