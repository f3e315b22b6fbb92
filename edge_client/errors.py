"""The exception tree.

FedgeError
├── BundleError        a bundle is damaged, foreign, or does not fit what is asked of it
├── CodecError         bytes that are not a valid update, delta or snapshot
├── ConfigError        a setting is unknown, of the wrong type or out of range
├── DataError          data that cannot be read or does not fit the bundle
├── ExportError        a model that cannot be turned into a training graph
├── FlashError         an image or a card that cannot be read, written or used
├── LedgerError        the server's ledger cannot be read or written
├── StoreError         the device's state cannot be read or written
├── TrainingError      a training run produced something that cannot be used
├── TransportError     the broker cannot be reached or refuses
└── WireError          a message or topic that breaks the wire contract
    └── TrustError     a message that is whole and not believed: forged, changed, said again, or out of date

A message names the thing, says what was found and what was expected, and what to do about it. The command line
prints it on one line and exits with status 2; no traceback reaches a user for a mistake of theirs.
"""


class FedgeError(Exception):
    """Root of every error that fedge raises on purpose."""


class BundleError(FedgeError):
    """A bundle is damaged, foreign, or does not fit what is asked of it."""


class CodecError(FedgeError):
    """Bytes that are not a valid update, delta or snapshot for the expected layout."""


class ConfigError(FedgeError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(FedgeError):
    """Data that cannot be read or whose shape or dtype does not fit the bundle."""


class ExportError(FedgeError):
    """A model that cannot be turned into a training graph."""


class FlashError(FedgeError):
    """An image or a card that cannot be read, written or used."""


class LedgerError(FedgeError):
    """The server's ledger cannot be read or written."""


class StoreError(FedgeError):
    """The device's state cannot be read or written."""


class TrainingError(FedgeError):
    """A training run produced something that cannot be used, such as NaN weights."""


class TransportError(FedgeError):
    """The broker cannot be reached or refuses the connection."""


class WireError(FedgeError):
    """A message or topic that breaks the wire contract."""


class TrustError(WireError):
    """A message that is whole and not believed: forged, changed, said again, or out of date."""
