"""Who a device is and whom it believes: keys, and what it remembers of what it has been told."""
