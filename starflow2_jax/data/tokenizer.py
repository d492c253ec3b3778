"""Text to token ids: a Hugging Face tokenizer folder, or a small byte-level BPE trained here."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers

from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import SpecialTokens

TOKENIZER_FILE = "tokenizer.json"
TURNS_FILE = "turns.json"
CACHED_CHARACTERS = 512
"""Texts shorter than this are encoded once: templates, labels, captions; others fill memory."""


@dataclasses.dataclass(frozen=True)
class Turns:
    """The chat template: what stands before and after each turn, and before all of them.

    An unconditional prompt is one empty user turn.
    """

    user_open: str = "<|im_start|>user\n"
    user_close: str = "<|im_end|>\n"
    assistant_open: str = "<|im_start|>assistant\n"
    assistant_close: str = "<|im_end|>"
    between: str = "\n"
    begin: str = ""


QWEN_TURNS = Turns(begin="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
COMPACT_TURNS = Turns("<|user|>", "", "<|assistant|>", "<|im_end|>", "")


class Tokenizer:
    """Text <-> ids, the special tokens' ids, and the chat template."""

    def __init__(self, backend: tokenizers.Tokenizer, turns: Turns) -> None:
        self.backend = backend
        self.turns = turns
        self._specials = {
            t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special
        }
        self.special = SpecialTokens(
            vision_start=self._id("<|vision_start|>"),
            vision_end=self._id("<|vision_end|>"),
            image_pad=self._id("<|image_pad|>"),
            end=self._id("<|im_end|>"),
            video_pad=self._specials.get("<|video_pad|>"),
        )
        self._cached = functools.lru_cache(maxsize=4096)(self._encode)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[tokenizers.Tokenizer, Turns]]:
        """Worker processes get copies; the cache stays behind."""
        return Tokenizer, (self.backend, self.turns)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens among them."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def _id(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:
            raise UserError(f"the tokenizer has no token {token}; a Qwen2.5-VL tokenizer has it")
        return index

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids) if text else ()

    def encode_template(self, text: str) -> tuple[int, ...]:
        """A text to ids, special tokens among them."""
        return self._cached(text) if len(text) < CACHED_CHARACTERS else self._encode(text)

    def encode(self, text: str, where: str = "") -> tuple[int, ...]:
        """A user's text to ids.

        Raises:
            UserError: the text holds a special token, or half of a surrogate pair; `where` says
                which text it is.
        """
        place = f"{where}: " if where else ""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON and the command line let it through
            raise UserError(
                f"{place}the text holds {text[error.start]!r} at character {error.start}, half of "
                "a surrogate pair and no character by itself: remove it"
            ) from error
        for token in self._specials:
            if token in text:
                at = text.index(token)
                raise UserError(
                    f"{place}the text holds the special token {token} at character {at}; images "
                    "are given as images, turns by the chat template: remove it"
                )
        return self.encode_template(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: pathlib.Path) -> None:
        """Writes the folder that `load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / TOKENIZER_FILE))
        (folder / TURNS_FILE).write_text(json.dumps(dataclasses.asdict(self.turns), indent=1))


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (`tokenizer.json`); Qwen's chat template by default.

    Raises:
        UserError: no such file, or a file that is not a tokenizer.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no {TOKENIZER_FILE}; expected a Hugging Face tokenizer folder")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path}: not a tokenizer file ({error})") from error
    turns_path = folder / TURNS_FILE
    turns = QWEN_TURNS
    if turns_path.is_file():
        turns = Turns(**json.loads(turns_path.read_text()))
    return Tokenizer(backend, turns)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with Qwen's image tokens and a compact chat template, for demo models."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    specials = [
        "<|im_end|>",
        "<|user|>",
        "<|assistant|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    ]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, COMPACT_TURNS)
