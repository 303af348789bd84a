"""Helpers that several packages use: files, distributed communication, copies to the CPU."""
