"""A card image of our own: Debian packages for the system, wheels for the client, no loop device."""
