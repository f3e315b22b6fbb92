"""Will it work here? What a device, or a broker, can do for fedge, in plain words."""
