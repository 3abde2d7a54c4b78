"""Sealing: blobs that only holders of a key can read, alter or put in another one's place.

AES-256-GCM (NIST SP 800-38D) over all bytes, with a random nonce and the name of what is sealed as
associated data. A sealed value is `key mark (8) · nonce (12) · ciphertext · tag (16)`. The mark, a
digest of the key, tells a colleague's value, which is left alone, from a damaged one.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Self

from chunkcache.errors import BlobError, SealedBlobError, SettingError

_KEY_BYTES, _MARK_BYTES, _NONCE_BYTES, _TAG_BYTES = 32, 8, 12, 16
_HEAD = _MARK_BYTES + _NONCE_BYTES
OVERHEAD = _HEAD + _TAG_BYTES  # bytes that sealing adds
_REMEDY = (
    "one or more keys of 64 hexadecimal digits, joined by commas: make one with "
    "python -c 'import secrets; print(secrets.token_hex(32))'"
)


@dataclass(frozen=True, slots=True)
class Seal:
    """Keys of 32 bytes. The first one seals, all of them open, so that keys can be replaced."""

    keys: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the setting `seal`.

        Raises:
            SettingError: It is no list of keys, or the library is not installed. The message does
                not show the keys.
        """
        if find_spec("cryptography") is None:
            raise SettingError(
                "seal needs the package cryptography: pip install 'chunkcache[seal]'"
            )
        try:
            keys = tuple(bytes.fromhex(part.strip()) for part in text.split(","))
        except ValueError:
            raise SettingError(f"seal must be {_REMEDY}") from None
        if any(len(key) != _KEY_BYTES for key in keys):
            raise SettingError(f"seal must be {_REMEDY}")
        return cls(keys)

    def seal(self, data: memoryview | bytes, name: str) -> memoryview:
        """Seal bytes under the name by which they will be asked for."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key, nonce = self.keys[0], os.urandom(_NONCE_BYTES)
        sealed = memoryview(bytearray(len(data) + OVERHEAD))
        sealed[:_HEAD] = _mark(key) + nonce
        AESGCM(key).encrypt_into(nonce, data, name.encode(), sealed[_HEAD:])
        return sealed

    def open(self, sealed: memoryview, name: str) -> memoryview:
        """The bytes that were sealed under this name, in writable memory of their own.

        Raises:
            SealedBlobError: They are sealed with another key.
            BlobError: They are something else, damaged, or sealed under another name.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if len(sealed) < OVERHEAD:
            raise BlobError("the blob is damaged: it is too short to be sealed")
        mark, nonce = bytes(sealed[:_MARK_BYTES]), bytes(sealed[_MARK_BYTES:_HEAD])
        key = next((key for key in self.keys if _mark(key) == mark), None)
        if key is None:
            raise SealedBlobError("the blob is sealed with a key that `seal` does not have")
        data = memoryview(bytearray(len(sealed) - OVERHEAD))
        try:
            AESGCM(key).decrypt_into(nonce, sealed[_HEAD:], name.encode(), data)
        except InvalidTag:
            raise BlobError("the blob is damaged or of another chunk: its seal is broken") from None
        return data

    def seal_text(self, text: str, name: str) -> str:
        """Seal text, as base64."""
        return base64.b64encode(self.seal(text.encode(), name)).decode()

    def open_text(self, sealed: str, name: str) -> str:
        """The text that was sealed under this name. Raises as `open` does."""
        try:
            data = base64.b64decode(sealed, validate=True)
        except ValueError as error:
            raise BlobError("the text is damaged: it is not base64") from error
        return bytes(self.open(memoryview(data), name)).decode()


def _mark(key: bytes) -> bytes:
    return hashlib.sha256(b"chunkcache/seal/1" + key).digest()[:_MARK_BYTES]
