"""Chains as evidence: what changed between two points, content extracted, nothing written to."""
