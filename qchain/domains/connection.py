"""libvirt: opened when needed, its errors turned into ours.

libvirt-python is an extra: nothing but this module imports it, and only when a host is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qchain.errors import FailedMidway, ImageError, QchainError, Refused, Unsupported, UsageError

__all__ = ["DEFAULT_URI", "Host", "LibvirtError", "told"]

DEFAULT_URI = "qemu:///system"


class LibvirtError(ImageError):
    """libvirt said no to a question (exit 4)."""

    todo = "see libvirt's own log"


def load() -> Any:
    """The module libvirt. Raises `Unsupported` where libvirt-python is not installed."""
    try:
        import libvirt
    except ImportError:
        raise Unsupported(
            "libvirt-python",
            "is not installed, and domains cannot be read without it",
            "install libvirt-dev, pkg-config, gcc and python3-dev, then 'pip install "
            "qchain[libvirt]'",
        ) from None
    return libvirt


@contextmanager
def told(what: str, changing: bool = False) -> Iterator[None]:
    """Errors of libvirt become ours: `LibvirtError`, or `FailedMidway` where it is `changing`."""
    libvirt = load()
    try:
        yield
    except libvirt.libvirtError as error:
        why = " ".join(str(error.get_error_message() or error).split())
        kind: type[QchainError] = FailedMidway if changing else LibvirtError
        raise kind(what, why) from None


class Host:
    """A connection to libvirt. Closing it twice is fine."""

    def __init__(self, uri: str = DEFAULT_URI) -> None:
        """Raises: `LibvirtError` when it cannot be reached, `Unsupported` without libvirt."""
        self.uri = uri
        self.libvirt = load()
        # It would print every error on stderr, also those that we handle.
        self.libvirt.registerErrorHandler(lambda _context, _error: None, None)
        try:
            self.connection = self.libvirt.open(uri)
        except self.libvirt.libvirtError as error:
            why = " ".join(str(error.get_error_message() or error).split())
            raise LibvirtError(
                uri, f"cannot be reached: {why}", "start libvirtd, or give another --connect URI"
            ) from None

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            with told(self.uri):
                connection.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def domains(self) -> list[Any]:
        """All domains of the host, running or not, by name."""
        with told(self.uri):
            found: list[Any] = self.connection.listAllDomains(0)
        return sorted(found, key=lambda each: str(each.name()))

    def domain(self, name: str) -> Any:
        """The domain of that name or UUID. Raises `UsageError` when there is none."""
        for look in (self.connection.lookupByName, self.connection.lookupByUUIDString):
            try:
                return look(name)
            except self.libvirt.libvirtError:
                continue
        known = ", ".join(str(each.name()) for each in self.domains()[:8]) or "none"
        raise UsageError(name, f"is no domain of {self.uri}", f"its domains are: {known}")

    def domain_xml(self, domain: Any, *, inactive: bool = True) -> str:
        """The full definition, security data included."""
        flags = self.libvirt.VIR_DOMAIN_XML_SECURE
        flags |= self.libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        with told(str(domain.name())):
            return str(domain.XMLDesc(flags))

    def snapshots_xml(self, domain: Any) -> tuple[dict[str, str], str | None]:
        """The full records of a domain's snapshots by name, and which one is current."""
        secure = self.libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
        with told(str(domain.name())):
            found = {
                str(each.getName()): str(each.getXMLDesc(secure))
                for each in domain.listAllSnapshots(0)
            }
            current = None
            if domain.hasCurrentSnapshot(0):
                current = str(domain.snapshotCurrent(0).getName())
        return found, current

    def checkpoints(self, domain: Any) -> list[str]:
        """Names of a domain's checkpoints; none where the driver has none."""
        try:
            return [str(each.getName()) for each in domain.listAllCheckpoints(0)]
        except self.libvirt.libvirtError as error:
            if error.get_error_code() == self.libvirt.VIR_ERR_NO_SUPPORT:
                return []
            raise LibvirtError(str(domain.name()), str(error.get_error_message())) from None

    def volume_path(self, pool: str, volume: str) -> str | None:
        """Where a volume of a pool lies; None where libvirt does not know."""
        try:
            found = self.connection.storagePoolLookupByName(pool).storageVolLookupByName(volume)
            return str(found.path())
        except self.libvirt.libvirtError:
            return None

    def pools(self) -> list[Any]:
        """The active pools; none where the driver has no storage."""
        try:
            flag = self.libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE
            return list(self.connection.listAllStoragePools(flag))
        except self.libvirt.libvirtError:
            return []

    def require_off(self, domain: Any) -> None:
        """Raise `Refused` when the guest runs now."""
        with told(str(domain.name())):
            active = bool(domain.isActive())
        if active:
            raise Refused(str(domain.name()), "has been started meanwhile", "shut it off")
