"""Other codecs for updates, in numpy from their papers; they only measure, nothing is sent."""
