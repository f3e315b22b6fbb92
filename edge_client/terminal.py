"""What strangers say, on an operator's terminal."""


def printable(text: str) -> str:
    """What a stranger says, on one line and without escape sequences."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
