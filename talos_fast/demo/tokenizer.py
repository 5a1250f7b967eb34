"""One token a word: the demo's texts use about a hundred words, open_clip's vocabulary of 49,408 would be 12 MB."""

import re
from collections.abc import Sequence

import torch

from talos_fast.errors import TalosError

PAD, START = 0, 1
_FIRST_WORD = 2
_WORD = re.compile(r"[A-Za-z0-9]+")


def words_of(text: str) -> list[str]:
    """The words of a text. Capital letters count: "a" is the article, "A" the letter."""
    return _WORD.findall(text)


class WordTokenizer:
    """Texts to token ids: start, words, end, padding.

    The end has the highest id, because CLIP pools a text where `argmax` finds it.

    Args:
        words: the vocabulary; the position decides the id.
        context_length: tokens a text, T.
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.words = tuple(words)
        self.context_length = context_length
        self.end = len(self.words) + _FIRST_WORD
        self.vocab_size = self.end + 1
        self._ids = {word: index + _FIRST_WORD for index, word in enumerate(self.words)}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Token ids, int64, shape (N, T).

        Raises:
            TalosError: a word outside the vocabulary, or more than T - 2 words.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = [self._row(text) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.context_length)

    def _row(self, text: str) -> list[int]:
        words = words_of(text)
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise TalosError(
                f"text {text!r}: the demo's tiny CLIP does not know {unknown}; use its {len(self.words)} words "
                f"({', '.join(self.words[:8])}, ...) in class names and prompt templates (in datasets.json), or a real "
                "model such as ViT-B-32 for texts of your own"
            )
        if len(words) > self.context_length - 2:
            raise TalosError(f"text {text!r}: found {len(words)} words; give at most {self.context_length - 2}")
        ids = [START, *(self._ids[word] for word in words), self.end]
        return ids + [PAD] * (self.context_length - len(ids))
