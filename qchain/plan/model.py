"""How long things take: an estimate from bytes, requests and files.

The defaults are those of an ordinary SSD; calibration replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT", "TimeModel"]


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Seconds = bytes / bandwidth + requests × cost + files × cost.

    Bandwidths in bytes per second, costs in seconds.
    """

    read_bandwidth: float = 1.0e9
    write_bandwidth: float = 4.0e8
    request_cost: float = 6.0e-5
    rebase_request_cost: float = 1.5e-4
    """rebase has one request at a time in flight, commit up to sixteen."""
    file_cost: float = 3.0e-3
    command_cost: float = 2.0e-2
    source: str = "estimated with defaults, not measured on this storage"

    def seconds(
        self, *, read: int, written: int, requests: int, serial_requests: int, files: int,
        commands: int,
    ) -> float:  # fmt: skip
        """The estimate for one candidate."""
        return (
            read / self.read_bandwidth
            + written / self.write_bandwidth
            + requests * self.request_cost
            + serial_requests * self.rebase_request_cost
            + files * self.file_cost
            + commands * self.command_cost
        )


DEFAULT = TimeModel()
