"""The header of one image: parsed once, with everything that is wrong with it.

Source: the qcow2 specification, "Header"; the limits and the order of the
checks are those of qemu's `qcow2_do_open`, where stricter ones do not help an
honest image (tables outside the file: qemu reads zeroes there).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from qchain.errors import ImageError, Unsupported
from qchain.hostfile import HostFile
from qchain.qcow2.extensions import BitmapsExtension, Extension, Extensions, LuksPointer, text_of
from qchain.qcow2.findings import Finding, Level
from qchain.qcow2.foreign import PROBE_BYTES, foreign_format
from qchain.qcow2.header_limits import MAX_BACKING_NAME, MAX_CLUSTER_BITS, judge
from qchain.qcow2.heads import HEADER_V2, HEADER_V3_TAIL, MAGIC, HeaderTail, HeaderV2

__all__ = ["Header", "read_header"]

INCOMPATIBLE: Final = ("dirty", "corrupt", "external data file", "compression type", "extended L2")
COMPATIBLE: Final = ("lazy refcounts",)
AUTOCLEAR: Final = ("bitmaps", "raw external data")

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))

_FIRST_READ = 4096
_V2_LENGTH = HEADER_V2
_V3_LENGTH = 104


@dataclass(frozen=True, slots=True)
class Header:
    """Everything a header says. Sizes and offsets in bytes, table sizes in entries."""

    version: int
    cluster_bits: int
    size: int
    """Virtual size, rounded down to 512 as qemu does."""
    stored_size: int
    """Virtual size as the header has it."""
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression_type: int
    backing_file_offset: int
    backing_name: str | None
    """Any bytes: `os.fsencode` gives them back."""
    backing_format: str | None
    data_file_name: str | None
    extensions: tuple[Extension, ...]
    feature_names: MappingProxyType[tuple[int, int], str]
    """(0 incompatible | 1 compatible | 2 autoclear, bit): the image's own name for it."""
    bitmaps_extension: BitmapsExtension | None
    """None as well when the image's bitmaps are stale as a whole."""
    luks_header: LuksPointer | None
    findings: tuple[Finding, ...] = ()

    @property
    def cluster_size(self) -> int:
        """Bytes. 0 when cluster_bits is out of all reason."""
        return 1 << self.cluster_bits if self.cluster_bits < 63 else 0

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount in bits; 0 when refcount_order is invalid."""
        return 1 << self.refcount_order if self.refcount_order <= 6 else 0

    @property
    def extended_l2(self) -> bool:
        """L2 entries of 16 bytes, with 32 subclusters each."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Guest data lies in another file; offsets of L2 entries are into that one."""
        return bool(self.incompatible & DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        """The data file, read as raw, is the guest's content."""
        return self.has_data_file and bool(self.autoclear & 2)

    @property
    def dirty(self) -> bool:
        """Refcounts may be wrong (lazy refcounts, not closed)."""
        return bool(self.incompatible & DIRTY)

    @property
    def lazy_refcounts(self) -> bool:
        """Refcounts may be written late; `dirty` says that they were not."""
        return bool(self.compatible & 1)

    @property
    def corrupt(self) -> bool:
        """Someone found metadata broken; only reading is allowed."""
        return bool(self.incompatible & CORRUPT)

    @property
    def compression(self) -> str:
        """'zlib', 'zstd', or 'unknown'."""
        return ("zlib", "zstd")[self.compression_type] if self.compression_type < 2 else "unknown"

    @property
    def encryption(self) -> str | None:
        """None, 'aes', 'luks', or 'unknown'."""
        known = (None, "aes", "luks")
        return known[self.crypt_method] if self.crypt_method < 3 else "unknown"

    @property
    def l2_entry_size(self) -> int:
        """Bytes: 8, or 16 with extended L2."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table, which fills one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def subclusters(self) -> int:
        """Per cluster: 32 with extended L2, else 1."""
        return 32 if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        """Bytes: the unit of allocation."""
        return self.cluster_size // self.subclusters

    @property
    def incompatible_names(self) -> list[str]:
        """Set incompatible features by name, lowest bit first."""
        return self.names_of(0, self.incompatible, INCOMPATIBLE)

    @property
    def compatible_names(self) -> list[str]:
        """Set compatible features by name."""
        return self.names_of(1, self.compatible, COMPATIBLE)

    @property
    def autoclear_names(self) -> list[str]:
        """Set autoclear features by name."""
        return self.names_of(2, self.autoclear, AUTOCLEAR)

    def names_of(self, kind: int, bits: int, known: tuple[str, ...] = ()) -> list[str]:
        """Names of the bits set: ours, else the image's own, else 'bit N'."""
        return [
            known[bit] if bit < len(known) else self.feature_names.get((kind, bit)) or f"bit {bit}"
            for bit in range(64)
            if bits >> bit & 1
        ]

    @property
    def problems(self) -> tuple[str, ...]:
        """All that is wrong, the worst first; an image with problems may still be readable."""
        found = [f for f in self.findings if f.level is not Level.WARNING]
        return tuple(f.text for f in sorted(found, key=lambda f: -f.level.value))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Worth knowing, but no problem."""
        return tuple(f.text for f in self.findings if f.level is Level.WARNING)

    @property
    def readable(self) -> bool:
        """Whether the guest-visible content may be read by what the header says."""
        return all(f.level in (Level.WARNING, Level.DAMAGE) for f in self.findings)

    def require_readable(self, path: str | Path) -> None:
        """Raise `ImageError`, or `Unsupported`, with the worst problem that forbids reading."""
        if not self.readable:
            worst = max(self.findings, key=lambda f: f.level.value)
            raise (ImageError if worst.level is Level.INVALID else Unsupported)(path, worst.text)


def read_header(file: HostFile) -> Header:
    """Parse and judge the header of `file`.

    Reads the first 4 KiB, and the whole first cluster (at most 2 MiB) only if the header
    reaches beyond.

    Raises:
        ImageError: the file is not qcow2 version 2 or 3, or ends within the header;
            everything else that is wrong is in the result's `findings`.
    """
    area = file.pread(0, _FIRST_READ)
    version = _version_of(file, area)
    base = HeaderV2.parse(area)
    tail = _tail_of(area, version)
    cluster_size = 1 << min(base.cluster_bits, MAX_CLUSTER_BITS)

    # The extensions end where the backing file name begins, in the first cluster.
    start = max(tail.header_length, _V2_LENGTH if version == 2 else _V3_LENGTH)
    end = min(base.backing_file_offset or cluster_size, cluster_size)
    extensions = Extensions()
    reached = max(extensions.read(area, start, end), min(base.backing_file_offset, cluster_size))
    if reached + MAX_BACKING_NAME > len(area) == _FIRST_READ:
        area = file.pread(0, cluster_size)
        extensions = Extensions()
        extensions.read(area, start, end)
    extensions.decode(
        cluster_size=cluster_size,
        crypt_method=base.crypt_method,
        bitmaps_valid=bool(tail.autoclear & 1),
    )
    backing_name, name_finding = _backing_name(area, base, cluster_size)
    header = Header(
        version=version,
        cluster_bits=base.cluster_bits,
        size=base.size // 512 * 512,
        stored_size=base.size,
        crypt_method=base.crypt_method,
        l1_size=base.l1_size,
        l1_table_offset=base.l1_table_offset,
        refcount_table_offset=base.refcount_table_offset,
        refcount_table_clusters=base.refcount_table_clusters,
        nb_snapshots=base.nb_snapshots,
        snapshots_offset=base.snapshots_offset,
        incompatible=tail.incompatible,
        compatible=tail.compatible,
        autoclear=tail.autoclear,
        refcount_order=tail.refcount_order,
        header_length=tail.header_length,
        compression_type=tail.compression_type,
        backing_file_offset=base.backing_file_offset,
        backing_name=backing_name,
        backing_format=extensions.backing_format,
        data_file_name=extensions.data_file_name,
        extensions=tuple(extensions.all),
        feature_names=MappingProxyType(extensions.feature_names),
        bitmaps_extension=extensions.bitmaps,
        luks_header=extensions.luks,
    )
    findings = [*judge(header, file.size), *extensions.findings, *name_finding]
    # Frozen for everyone else; judging needs the finished fields.
    object.__setattr__(header, "findings", tuple(findings))
    return header


def _version_of(file: HostFile, area: bytes) -> int:
    """The version, if the file is one that can be described at all."""
    if area[:4] != MAGIC:
        other = foreign_format(area[:PROBE_BYTES], file.size)
        raise ImageError(
            file.path, f"not qcow2 but {other}" if other else "not qcow2", "name a qcow2 image"
        )
    version = int.from_bytes(area[4:8], "big")
    if len(area) >= 8 and version not in (2, 3):
        raise Unsupported(
            file.path, f"qcow2 version {version}, not 2 or 3", "convert it with qemu-img"
        )
    if len(area) < (_V2_LENGTH if version == 2 else _V3_LENGTH):
        raise ImageError(
            file.path, f"file of {len(area)} bytes ends within the header", "look for a full copy"
        )
    return version


def _tail_of(area: bytes, version: int) -> HeaderTail:
    """The fields of version 3; for version 2, what it implies."""
    if version == 2:
        return HeaderTail(0, 0, 0, 4, _V2_LENGTH, 0)
    raw = area[_V2_LENGTH : _V2_LENGTH + HEADER_V3_TAIL]
    tail = HeaderTail.parse(raw.ljust(HEADER_V3_TAIL, b"\0"))
    return tail._replace(compression_type=0) if tail.header_length <= _V3_LENGTH else tail


def _backing_name(
    area: bytes, base: HeaderV2, cluster_size: int
) -> tuple[str | None, tuple[Finding, ...]]:
    """The backing file name, or None and why it cannot be taken."""
    offset, length = base.backing_file_offset, base.backing_file_size
    if offset == 0:
        return None, ()
    if offset > cluster_size:
        text = f"backing file name at offset {offset}, outside the first cluster"
    elif length > min(MAX_BACKING_NAME, cluster_size - offset):
        text = (
            f"backing file name of {length} bytes is too long: at most {MAX_BACKING_NAME}, "
            f"within the first cluster of {cluster_size}"
        )
    elif offset + length > len(area):
        text = "backing file name ends beyond the file"
    else:
        return text_of(area[offset : offset + length]) or None, ()
    return None, (Finding(text, Level.INVALID),)
