"""Launches on a device: memory, drivers, the host's side, the report."""
