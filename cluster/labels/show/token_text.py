"""Readable text of token ids, from the vocabulary that a label set keeps.

Two ways to spell bytes in a vocabulary are in use, and both are undone: the byte-level alphabet of
GPT-2 and its heirs, where each byte has a printable character of its own (a space is ``Ġ``), and
SentencePiece's, where a space is ``▁`` and other bytes are ``<0x0A>``.
"""

import re
from collections.abc import Iterable, Mapping

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 bytes stand for themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    pairs = [(chr(byte), byte) for byte in printable]
    return dict(pairs + [(chr(256 + n), byte) for n, byte in enumerate(others)])


_BYTE_LEVEL = _byte_alphabet()


class TokenText:
    """Turns ids into text."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        """Prepares.

        Args:
            vocabulary: token -> id; may be empty, then ids are shown as numbers.
        """
        tokens = {id_: token for token, id_ in vocabulary.items()}
        is_byte_level = any(token.startswith("Ġ") for token in vocabulary) or (
            len(vocabulary) >= 256 and _BYTE_LEVEL.keys() <= vocabulary.keys()
        )
        self._bytes = {
            id_: _byte_level(token) if is_byte_level else _sentence_piece(token)
            for id_, token in tokens.items()
        }

    def text(self, ids: Iterable[int]) -> str:
        """The text of a run of tokens; bytes that are no UTF-8 become replacement characters."""
        parts = (self._bytes.get(int(id_), f"<{id_}>".encode()) for id_ in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def token(self, id_: int) -> str:
        """One token on one line: spaces stay, line breaks become a sign."""
        text = self.text([id_])
        return "".join(_SHOWN.get(character, character) for character in text)


def _byte_level(token: str) -> bytes:
    if all(character in _BYTE_LEVEL for character in token):
        return bytes(_BYTE_LEVEL[character] for character in token)
    return token.encode()


def _sentence_piece(token: str) -> bytes:
    found = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(found.group(1), 16)]) if found else token.replace("▁", " ").encode()
