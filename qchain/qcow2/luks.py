"""LUKS inside qcow2: the header, the way from a passphrase to the key, and decryption.

passphrase --PBKDF2--> key of a slot --decrypts--> split key --merge--> master key
master key + host sector number --> guest data

Sources: the LUKS on-disk format specification 1.2.3; the qcow2 specification, "Full
disk encryption header pointer"; the limits and the ciphers are those of qemu's
`crypto/block-luks.c`. Sectors are 512 bytes, and the number that goes into the
initialization vector is the host offset / 512 (`qcow2_co_encdec` with
`crypt_physical_offset`), not the guest's.

Every mode is put together from AES on single blocks, for many sectors at once with
numpy: a cipher object for each sector of 512 bytes would cost ten times as much.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from construct import Array, Bytes, Const, Int16ub, Int32ub, Struct

from qchain.errors import ImageError, Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2.header import Header

__all__ = [
    "LUKS_HEADER",
    "MAX_ITERATIONS",
    "KeySlot",
    "LuksCipher",
    "LuksHeader",
    "SectorCipher",
    "merge_stripes",
    "read_luks_header",
    "unlock",
]

U64 = npt.NDArray[np.uint64]

SECTOR = 512
SLOTS = 8
STRIPES = 4000
MAX_ITERATIONS = 100_000_000
"""Of PBKDF2, for all that one attempt has to try. qemu chooses as many as take two seconds,
a few millions at most; a header that asks for 2^32 would keep us busy for hours."""

_ACTIVE = 0x00AC71F3
_INACTIVE = 0x0000DEAD
_DIGEST = 20
_BLOCK = 16
_BATCH = 2048  # sectors decrypted at once: one MiB stays in the cache
_KEY_SIZES = (16, 24, 32)
_MODES = ("xts", "cbc", "ctr", "ecb")
_NO_EXTRA = "reading LUKS content needs the Python package 'cryptography'"

LUKS_HEADER: Any = Struct(
    "magic" / Const(b"LUKS\xba\xbe"),
    "version" / Int16ub,  # 1
    "cipher" / Bytes(32),  # "aes"; this and the next two end with a NUL
    "mode" / Bytes(32),  # "xts-plain64", "cbc-essiv:sha256", "ecb"
    "hash" / Bytes(32),  # of PBKDF2 and of the anti-forensic splitter
    "payload_offset" / Int32ub,  # sectors; qcow2 keeps the payload in its own clusters
    "key_bytes" / Int32ub,  # of the master key, both halves with xts
    "digest" / Bytes(_DIGEST),  # PBKDF2 of the master key
    "digest_salt" / Bytes(32),
    "digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots"
    / Array(
        SLOTS,
        Struct(
            "state" / Int32ub,
            "iterations" / Int32ub,  # PBKDF2
            "salt" / Bytes(32),
            "offset" / Int32ub,  # of the split key, in sectors from the start of this header
            "stripes" / Int32ub,  # how many pieces the master key is split into: 4000
        ),
    ),
)
"""The partition header of LUKS version 1: 592 bytes, big endian."""


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One of eight ways to the master key. `offset` in bytes from the LUKS header."""

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int


@dataclass(frozen=True)
class LuksHeader:
    """What a LUKS header says, none of which needs a passphrase."""

    version: int
    cipher: str
    """'aes', 'serpent', 'twofish', 'cast5'."""
    mode: str
    """'xts', 'cbc', 'ctr', 'ecb'."""
    ivgen: str | None
    """'plain64', 'plain', 'essiv'; None with ecb where none is named."""
    ivgen_hash: str | None
    """Of essiv only."""
    hash: str
    key_bytes: int
    uuid: str
    slots: tuple[KeySlot, ...]
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    offset: int
    """Where the LUKS header is in the file, bytes."""
    length: int
    """Bytes set aside for it and the split keys."""

    @property
    def cipher_bits(self) -> int:
        """Key length of the cipher itself: half of the master key with xts."""
        return self.key_bytes * 8 // (2 if self.mode == "xts" else 1)

    @property
    def cipher_name(self) -> str:
        """As qemu-img names it: 'aes-256'."""
        return f"{self.cipher}-{self.cipher_bits}"

    @property
    def active_slots(self) -> tuple[int, ...]:
        """Numbers of the key slots in use."""
        return tuple(number for number, slot in enumerate(self.slots) if slot.active)

    def as_json(self) -> dict[str, object]:
        """What `qchain info` shows."""
        return {
            "version": self.version,
            "cipher": self.cipher_name,
            "mode": self.mode,
            "ivgen": self.ivgen,
            "ivgen_hash": self.ivgen_hash,
            "hash": self.hash,
            "uuid": self.uuid,
            "key_slots": [
                {"slot": number, "iterations": self.slots[number].iterations}
                for number in self.active_slots
            ],
        }


def read_luks_header(file: HostFile, header: Header) -> LuksHeader | None:
    """The LUKS header of an image; None when it is not encrypted with LUKS.

    Raises:
        ImageError: it is not where the image says, or breaks the limits of qemu's
            `qcrypto_block_luks_check_header`.
        Unsupported: another version of LUKS than 1 (qcow2 knows no other).
    """
    where = header.luks_header
    if where is None:
        return None
    size = LUKS_HEADER.sizeof()
    raw = file.pread(where.offset, min(size, where.length))
    if len(raw) < size:
        raise ImageError(file.path, f"LUKS header at offset {where.offset} is cut off")
    if raw[:6] != b"LUKS\xba\xbe":
        raise ImageError(file.path, f"no LUKS header at offset {where.offset}")
    entry = LUKS_HEADER.parse(raw)
    if entry.version != 1:
        raise Unsupported(file.path, f"LUKS version {entry.version}, not 1", "")
    why = _wrong(entry)
    if why is not None:
        raise ImageError(file.path, f"its LUKS header has {why}")
    mode, dash, ivgen = _text(entry.mode).partition("-")
    ivgen, colon, ivgen_hash = ivgen.partition(":")
    return LuksHeader(
        version=entry.version,
        cipher=_text(entry.cipher),
        mode=mode,
        ivgen=ivgen if dash else None,
        ivgen_hash=ivgen_hash if colon else None,
        hash=_text(entry.hash),
        key_bytes=entry.key_bytes,
        uuid=_text(entry.uuid),
        slots=tuple(
            KeySlot(
                slot.state == _ACTIVE,
                slot.iterations,
                slot.salt,
                slot.offset * SECTOR,
                slot.stripes,
            )
            for slot in entry.slots
        ),
        digest=entry.digest,
        digest_salt=entry.digest_salt,
        digest_iterations=entry.digest_iterations,
        offset=where.offset,
        length=where.length,
    )


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("ascii", "backslashreplace")


def _wrong(entry: Any) -> str | None:
    """The first thing in a header that qemu does not open, or None."""
    for field in ("cipher", "mode", "hash"):
        if b"\0" not in entry[field]:
            return f"a {field} name without an end"
    if not 1 <= entry.key_bytes <= 64:
        return f"a master key of {entry.key_bytes} bytes"
    if entry.digest_iterations == 0:
        return "a master key digest of no iterations"
    first_free = -(-LUKS_HEADER.sizeof() // SECTOR)
    if entry.payload_offset < first_free:
        return "a payload that overlaps it"
    length = -(-entry.key_bytes * STRIPES // SECTOR)
    for number, slot in enumerate(entry.slots):
        if slot.state not in (_ACTIVE, _INACTIVE):
            return f"key slot {number} in state {slot.state:#x}, neither active nor inactive"
        if slot.stripes != STRIPES:
            return f"key slot {number} with {slot.stripes} stripes, not {STRIPES}"
        if slot.offset < first_free or slot.offset + length > entry.payload_offset:
            return f"key slot {number} outside of the space for keys"
        if slot.state == _ACTIVE and slot.iterations == 0:
            return f"key slot {number} with no iterations"
    offsets = sorted(slot.offset for slot in entry.slots)
    if any(high - low < length for low, high in itertools.pairwise(offsets)):
        return "key slots that overlap"
    return None


# --- From a passphrase to the master key -----------------------------------------------


def unlock(file: HostFile, luks: LuksHeader, secret: bytes) -> LuksCipher:
    """Try `secret` on every active key slot.

    Args:
        secret: the passphrase, taken as it is (qemu too keeps a newline at its end).

    Raises:
        ImageError: no key slot opens with it; a split key ends beyond the file; more than
            `MAX_ITERATIONS` would be needed.
        Unsupported: a cipher, mode or hash that is not supported, or the `cryptography`
            package is missing.
    """
    _require_supported(file, luks)
    spent = 0
    for number in luks.active_slots:
        slot = luks.slots[number]
        spent += slot.iterations + luks.digest_iterations
        if spent > MAX_ITERATIONS:
            raise ImageError(
                file.path,
                f"its key slots up to {number} ask for {spent} iterations of PBKDF2, "
                f"more than {MAX_ITERATIONS}",
                "",
            )
        key = _derive(luks.hash, secret, slot.salt, slot.iterations, luks.key_bytes)
        length = luks.key_bytes * STRIPES
        split = bytearray(-(-length // SECTOR) * SECTOR)
        if slot.offset + length > luks.length or (
            file.pread_into(memoryview(split)[:length], luks.offset + slot.offset) < length
        ):
            raise ImageError(file.path, f"key slot {number} ends beyond the LUKS header's space")
        # The split key is numbered from zero, wherever it lies.
        SectorCipher(luks, key).decrypt(memoryview(split), 0)
        master = merge_stripes(bytes(split[:length]), luks.key_bytes, luks.hash)
        found = _derive(luks.hash, master, luks.digest_salt, luks.digest_iterations, _DIGEST)
        if hmac.compare_digest(found, luks.digest):
            return LuksCipher(SectorCipher(luks, master))
    raise ImageError(
        file.path,
        "the passphrase opens none of its LUKS key slots",
        "check the secret file (a newline at its end counts)",
    )


def _derive(name: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    return hashlib.pbkdf2_hmac(name, secret, salt, iterations, length)


def _require_supported(file: HostFile, luks: LuksHeader) -> None:
    whole = luks.cipher_bits // 8
    ivgen_known = luks.ivgen in ("plain64", "plain", "essiv") or (
        luks.mode == "ecb" and luks.ivgen is None
    )
    if luks.cipher != "aes" or whole not in _KEY_SIZES:
        why = f"LUKS cipher {luks.cipher_name!r}; only AES is supported"
    elif luks.mode not in _MODES or (luks.mode == "xts" and luks.key_bytes % 2):
        why = f"LUKS cipher mode {luks.mode!r}"
    elif not ivgen_known:
        why = f"LUKS initialization vector {luks.ivgen!r}"
    elif not _hash_works(luks.hash):
        why = f"LUKS hash {luks.hash!r}, which this Python does not offer"
    elif luks.ivgen == "essiv" and not (luks.ivgen_hash and _hash_works(luks.ivgen_hash)):
        why = f"LUKS hash {luks.ivgen_hash!r} for initialization vectors"
    elif luks.ivgen == "essiv" and _digest_size(luks.ivgen_hash) not in _KEY_SIZES:
        why = f"LUKS hash {luks.ivgen_hash!r} for initialization vectors: no key of AES is so long"
    else:
        return
    raise Unsupported(file.path, why, "read it with qemu-img")


def _hash_works(name: str) -> bool:
    try:
        # What hashlib lists may still be switched off in its OpenSSL.
        hashlib.pbkdf2_hmac(name, b"", b"", 1, 1)
    except (ValueError, TypeError):
        return False
    return True


def _digest_size(name: str | None) -> int:
    return hashlib.new(name or "", usedforsecurity=False).digest_size


def merge_stripes(split: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key that `split`, `STRIPES` pieces of `key_bytes` each, was made of.

    Source: LUKS specification, "Anti-forensic splitting"; qemu's `qcrypto_afsplit_decode`.
    """
    state = 0
    for start in range(0, STRIPES * key_bytes, key_bytes):
        piece = int.from_bytes(split[start : start + key_bytes], "big")
        mixed = state ^ piece
        if start == (STRIPES - 1) * key_bytes:
            return mixed.to_bytes(key_bytes, "big")
        state = int.from_bytes(_diffuse(mixed.to_bytes(key_bytes, "big"), hash_name), "big")
    raise AssertionError("a split key has at least one piece")


def _diffuse(data: bytes, hash_name: str) -> bytes:
    size = _digest_size(hash_name)
    out = bytearray()
    for number, start in enumerate(range(0, len(data), size)):
        piece = data[start : start + size]
        state = hashlib.new(hash_name, number.to_bytes(4, "big") + piece, usedforsecurity=False)
        out += state.digest()[: len(piece)]
    return bytes(out)


# --- Decryption -------------------------------------------------------------------------


class _Aes:
    """AES on single blocks, with one key: any number of them per call."""

    def __init__(self, key: bytes, what: object) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise Unsupported(str(what), _NO_EXTRA, "pip install 'qchain[luks]'") from None
        # The modes are built on this; no data is ever kept in ECB.
        self._cipher: Any = Cipher(algorithms.AES(key), modes.ECB())

    def encrypt(self, blocks: U64) -> U64:
        """Shape (..., 2) in and out: each last axis is one block, its bytes as they lie."""
        return self._run(self._cipher.encryptor(), blocks)

    def decrypt(self, blocks: U64) -> U64:
        """As `encrypt`."""
        return self._run(self._cipher.decryptor(), blocks)

    @staticmethod
    def _run(context: Any, blocks: U64) -> U64:
        data = np.ascontiguousarray(blocks)
        out = np.empty(data.nbytes + _BLOCK - 1, np.uint8)
        context.update_into(data.reshape(-1).view(np.uint8).data, out.data)
        return out[: data.nbytes].view("<u8").reshape(data.shape)


class SectorCipher:
    """Decrypts whole sectors with one key, given the number of the first.

    A sector is (32, 2) little-endian words: 32 blocks of two.
    """

    def __init__(self, luks: LuksHeader, key: bytes) -> None:
        self._mode = luks.mode
        self._ivgen = luks.ivgen
        half = len(key) // 2 if luks.mode == "xts" else len(key)
        self._data = _Aes(key[:half], luks.cipher_name)
        self._tweak = _Aes(key[half:], luks.cipher_name) if luks.mode == "xts" else None
        self._essiv: _Aes | None = None
        if luks.ivgen == "essiv":
            salt = hashlib.new(luks.ivgen_hash or "", key, usedforsecurity=False).digest()
            self._essiv = _Aes(salt, luks.cipher_name)

    def decrypt(self, view: memoryview, sector: int) -> None:
        """Decrypt `view`, whole sectors, in place; `sector` numbers the first one.

        Safe to call from several threads.
        """
        words = np.frombuffer(view, "<u8").reshape(-1, SECTOR // _BLOCK, 2)
        for start in range(0, len(words), _BATCH):
            part = words[start : start + _BATCH]
            numbers = np.arange(len(part), dtype=np.uint64) + np.uint64(sector + start)
            part[:] = self._decrypt(part, numbers)

    def _decrypt(self, data: U64, numbers: U64) -> U64:
        if self._mode == "ecb":
            return self._data.decrypt(data)
        vectors = self._vectors(numbers)
        if self._mode == "cbc":
            out = self._data.decrypt(data)
            out[:, 0] ^= vectors
            out[:, 1:] ^= data[:, :-1]
            return out
        if self._mode == "ctr":
            return data ^ self._data.encrypt(_counters(vectors))
        assert self._tweak is not None
        tweaks = _multiples(self._tweak.encrypt(vectors))
        return self._data.decrypt(data ^ tweaks) ^ tweaks

    def _vectors(self, numbers: U64) -> U64:
        """The initialization vector of each sector: shape (n,) in, (n, 2) out."""
        out = np.zeros((len(numbers), 2), "<u8")
        out[:, 0] = numbers & np.uint64(0xFFFFFFFF) if self._ivgen == "plain" else numbers
        return out if self._essiv is None else self._essiv.encrypt(out)


def _multiples(first: U64) -> U64:
    """The tweaks of a sector's blocks (IEEE 1619): each is the one before times x."""
    out = np.empty((len(first), SECTOR // _BLOCK, 2), "<u8")
    low, high = first[:, 0], first[:, 1]
    one, top = np.uint64(1), np.uint64(63)
    for block in range(SECTOR // _BLOCK):
        out[:, block, 0], out[:, block, 1] = low, high
        low, high = (
            (low << one) ^ (high >> top) * np.uint64(0x87),
            (high << one) | (low >> top),
        )
    return out


def _counters(vectors: U64) -> U64:
    """Counter mode: the vector as one big-endian number, counted up block by block."""
    native = vectors.byteswap()
    high, low = native[:, :1], native[:, 1:]
    sums = low + np.arange(SECTOR // _BLOCK, dtype=np.uint64)
    carry = (sums < low).astype(np.uint64)
    return np.stack((high + carry, sums), axis=-1).byteswap()


@dataclass(frozen=True)
class LuksCipher:
    """An unlocked image: reads guest data at any host offset, decrypted."""

    sectors: SectorCipher

    def read_into(self, view: memoryview, offset: int, data: HostFile) -> None:
        """Guest data at host `offset` of the file `data`.

        As in qemu what lies beyond the end of the file is zeroes, decrypted: preallocated
        clusters that were never written read as noise, not as zeroes.
        """
        first = offset // SECTOR
        end = -(-(offset + len(view)) // SECTOR)
        if offset % SECTOR == 0 and len(view) % SECTOR == 0 and _in_place(view):
            done = data.pread_into(view, offset)
            view[done:] = bytes(len(view) - done)
            self.sectors.decrypt(view, first)
            return
        buffer = bytearray((end - first) * SECTOR)
        data.pread_into(memoryview(buffer), first * SECTOR)
        self.sectors.decrypt(memoryview(buffer), first)
        skip = offset - first * SECTOR
        view[:] = memoryview(buffer)[skip : skip + len(view)]


def _in_place(view: memoryview) -> bool:
    return view.contiguous and view.format == "B" and not view.readonly
