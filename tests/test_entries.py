"""The bulk decoders of `entries` say what the construct declarations say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qchain.qcow2 import structures
from qchain.qcow2.entries import (
    NO_HOST,
    Kind,
    allocated_extended,
    allocated_standard,
    compressed_location,
    decode_extended,
    decode_standard,
    zero_extended,
    zero_standard,
)

ALL_CLUSTER_BITS = range(9, 22)


def words_for(cluster_bits: int) -> st.SearchStrategy[int]:
    """Entries of every kind: honest ones, each flag alone, reserved bits, plain noise."""
    clusters = st.integers(0, (1 << 56 - cluster_bits) - 1)
    flags = st.sampled_from(
        [0, 1, 1 << 63, 1 << 62, 1 << 63 | 1, 1 << 62 | 1 << 63, 1 << 62 | 1, 1 << 56, 1 << 8]
    )
    return st.one_of(
        st.builds(lambda c, f: c << cluster_bits | f, clusters, flags),
        st.builds(lambda f: f, flags),
        # Not cluster-aligned (only possible above 512 bytes).
        st.builds(lambda c, f: c << 9 | f, st.integers(0, (1 << 47) - 1), flags),
        st.integers(0, (1 << 64) - 1),
    )


BITMAPS = st.one_of(
    st.sampled_from([0, 1, 1 << 32, 0xFFFFFFFF, 0xFFFFFFFF << 32, (1 << 64) - 1]),
    # Honest: no subcluster both allocated and zero.
    st.builds(
        lambda a, z: a | (z & ~a) << 32, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
    ),
    st.integers(0, (1 << 64) - 1),
)


def parse(word: int, cluster_bits: int) -> Any:
    return structures.l2_entry(cluster_bits).parse(word.to_bytes(8, "big"))


def has_host(entry: Any, data_file: bool) -> bool:
    return entry.body.offset != 0 or (data_file and entry.copied)


def expected_standard(
    word: int, cluster_bits: int, version: int, data_file: bool
) -> tuple[Kind, int]:
    """The specification's order: compressed, zero, no offset, normal."""
    entry = parse(word, cluster_bits)
    if entry.compressed:
        return (Kind.INVALID if data_file else Kind.COMPRESSED), word & ((1 << 62) - 1)
    # A zero cluster at offset 0 has no place, not even in a data file.
    somewhere = has_host(entry, data_file and not entry.body.zero)
    host = entry.body.offset if somewhere else NO_HOST
    if entry.body.offset % (1 << cluster_bits):
        return Kind.INVALID, host
    if entry.body.zero:
        return (Kind.ZERO if version >= 3 else Kind.INVALID), host
    return (Kind.UNALLOCATED if host == NO_HOST else Kind.DATA), host


def expected_extended(
    word: int, bitmap: int, cluster_bits: int, data_file: bool
) -> list[tuple[Kind, int]]:
    raw = word.to_bytes(8, "big") + bitmap.to_bytes(8, "big")
    parsed = structures.l2_entry_extended(cluster_bits).parse(raw)
    entry, sub = parsed.entry, parsed.subclusters
    if entry.compressed:
        kind = Kind.INVALID if data_file else Kind.COMPRESSED
        return [(kind, word & ((1 << 62) - 1))] * 32
    result = []
    for index in range(32):
        allocated, zero = sub.allocated[index], sub.zero[index]
        host = NO_HOST
        if has_host(entry, data_file):
            host = entry.body.offset + index * ((1 << cluster_bits) // 32)
        if (
            (allocated and zero)
            or (allocated and host == NO_HOST)
            or entry.body.offset % (1 << cluster_bits)
        ):
            kind = Kind.INVALID
        elif zero:
            kind = Kind.ZERO
        else:
            kind = Kind.DATA if allocated else Kind.UNALLOCATED
        result.append((kind, host))
    return result


@pytest.mark.parametrize("cluster_bits", ALL_CLUSTER_BITS)
@pytest.mark.parametrize("version", [2, 3])
@given(data=st.data(), data_file=st.booleans())
@settings(max_examples=25, deadline=None)
def test_standard(cluster_bits: int, version: int, data: st.DataObject, data_file: bool) -> None:
    words = data.draw(st.lists(words_for(cluster_bits), min_size=1, max_size=20))
    kinds, hosts = decode_standard(
        np.array(words, np.uint64), cluster_bits=cluster_bits, version=version, data_file=data_file
    )
    expected = [expected_standard(word, cluster_bits, version, data_file) for word in words]
    assert kinds.tolist() == [int(kind) for kind, _ in expected]
    assert hosts.tolist() == [host for _, host in expected]


@pytest.mark.parametrize("cluster_bits", range(14, 22))
@given(data=st.data(), data_file=st.booleans())
@settings(max_examples=25, deadline=None)
def test_extended(cluster_bits: int, data: st.DataObject, data_file: bool) -> None:
    pairs = data.draw(st.lists(st.tuples(words_for(cluster_bits), BITMAPS), min_size=1, max_size=6))
    kinds, hosts = decode_extended(
        np.array(pairs, np.uint64).reshape(-1), cluster_bits=cluster_bits, data_file=data_file
    )
    expected = [
        one
        for word, bitmap in pairs
        for one in expected_extended(word, bitmap, cluster_bits, data_file)
    ]
    assert kinds.tolist() == [int(kind) for kind, _ in expected]
    assert hosts.tolist() == [host for _, host in expected]


@pytest.mark.parametrize("cluster_bits", ALL_CLUSTER_BITS)
@given(data=st.data(), data_file=st.booleans())
@settings(max_examples=25, deadline=None)
def test_allocation_standard(cluster_bits: int, data: st.DataObject, data_file: bool) -> None:
    """The fast tests on words as read agree with the declarations."""
    words = data.draw(st.lists(words_for(cluster_bits), min_size=1, max_size=20))
    raw = np.array(words, ">u8").view(np.uint64)
    parsed = [parse(word, cluster_bits) for word in words]
    zero = [not e.compressed and e.body.zero for e in parsed]
    allocated = [
        e.compressed or z or has_host(e, data_file) for e, z in zip(parsed, zero, strict=True)
    ]
    assert allocated_standard(raw, data_file=data_file).tolist() == allocated
    found, packed = zero_standard(raw)
    assert (found.tolist() if found is not None else [False] * len(words)) == zero
    assert packed == any(entry.compressed for entry in parsed)


@pytest.mark.parametrize("cluster_bits", range(14, 22))
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_allocation_extended(cluster_bits: int, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.tuples(words_for(cluster_bits), BITMAPS), min_size=1, max_size=6))
    raw = np.array(pairs, ">u8").reshape(-1).view(np.uint64)
    allocated, zero = [], []
    for word, bitmap in pairs:
        entry = parse(word, cluster_bits)
        sub = structures.SUBCLUSTER_BITMAP.parse(bitmap.to_bytes(8, "big"))
        for a, z in zip(sub.allocated, sub.zero, strict=True):
            allocated.append(bool(entry.compressed or a or z))
            zero.append(bool(z and not entry.compressed))
    assert allocated_extended(raw).tolist() == allocated
    found = zero_extended(raw)
    assert (found.tolist() if found is not None else [False] * len(zero)) == zero


@pytest.mark.parametrize("cluster_bits", ALL_CLUSTER_BITS)
@given(descriptor=st.integers(0, (1 << 62) - 1))
@settings(max_examples=25, deadline=None)
def test_compressed_location(cluster_bits: int, descriptor: int) -> None:
    body = parse(descriptor | 1 << 62, cluster_bits).body
    assert compressed_location(descriptor, cluster_bits) == (body.offset, body.size)
