"""Emulated phones: device profiles, link conditions, fleets."""
