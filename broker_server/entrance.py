"""What a server does at a broker before it begins an epoch there."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from broker_server.config import Federation
from broker_server.packets import fitted
from broker_server.rival import refuse_rival
from edge_client.address import Address
from edge_client.tls import Tls

if TYPE_CHECKING:
    from broker_server.keyring import Keyring


async def enter(
    settings: Federation,
    address: Address,
    log: Callable[[str], None],
    *,
    attempts: int = 0,
    tls: Tls | None = None,
    keyring: "Keyring | None" = None,
) -> Federation:
    """The settings that fit the broker at ``address``, where no other server of the federation lives.

    Raises:
        LedgerError: one does.
        TransportError: the broker cannot be reached after ``attempts``, where that is not 0, or takes too little.
    """
    found = await fitted(settings, address, log, attempts=attempts, tls=tls)
    await refuse_rival(found, address, tls, keyring)
    return found
