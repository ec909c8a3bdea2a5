"""Decodes token ids to readable text with a label set's vocabulary.

A vocabulary does not state how its tokens encode bytes. Two encodings are detected: GPT-2's
byte-level alphabet, in which a space is ``Ġ``, and SentencePiece's, in which a space is ``▁`` and
bytes without their own token are ``<0x0A>``.
"""

from collections.abc import Iterable, Mapping

from tokenizers import decoders, pre_tokenizers

_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


class TokenText:
    """Decodes token ids."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        """
        Args:
            vocabulary: token -> id; unknown ids are shown as numbers.
        """
        self._tokens = {id_: token for token, id_ in vocabulary.items()}
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        is_byte_level = vocabulary.keys() >= set(alphabet) or any(
            token.startswith("Ġ") for token in vocabulary
        )
        # Not decoders.Metaspace, which drops the space before the first token.
        sentencepiece = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        self._decoder = decoders.Sequence(
            [decoders.ByteLevel()] if is_byte_level else sentencepiece
        )

    def text(self, ids: Iterable[int]) -> str:
        """The text of consecutive tokens; invalid UTF-8 becomes replacement characters."""
        return self._decoder.decode([self._tokens.get(int(id_), f"<{id_}>") for id_ in ids])

    def token(self, id_: int) -> str:
        """One token on one line, with visible symbols for tabs and line breaks."""
        return self.text([id_]).translate(_VISIBLE)
