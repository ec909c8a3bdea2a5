"""Readable text of token ids, from the vocabulary that a label set keeps.

The vocabulary alone does not say how its tokens spell bytes. Two spellings are in use and told
apart here: the byte-level alphabet of GPT-2, in which a space is ``Ġ``, and that of SentencePiece,
in which a space is ``▁`` and bytes without a token of their own are ``<0x0A>``.
"""

from collections.abc import Iterable, Mapping

from tokenizers import decoders, pre_tokenizers

_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


class TokenText:
    """Decodes token ids."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        """
        Args:
            vocabulary: token -> id; ids that it lacks are shown as numbers.
        """
        self._tokens = {id_: token for token, id_ in vocabulary.items()}
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        is_byte_level = vocabulary.keys() >= set(alphabet) or any(
            token.startswith("Ġ") for token in vocabulary
        )
        # Not decoders.Metaspace, which drops the space in front of the first token.
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
