"""A vector of floats to few bytes and back."""
