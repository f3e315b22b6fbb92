"""The chunk that fits the broker: measured before the server builds anything that it would have to cut anew."""

import asyncio
import itertools
import secrets
from collections.abc import Callable

import msgspec

from broker_server.config import Federation, Transfer
from edge_client.address import Address
from edge_client.doctor.limits import LEAST, OVERHEAD, fitting, largest_payload
from edge_client.errors import TransportError
from edge_client.tls import Tls

_SHORTEST, _LONGEST = 0.25, 60.0


async def fitted(
    settings: Federation, address: Address, log: Callable[[str], None], *, attempts: int = 0, tls: Tls | None = None
) -> Federation:
    """The settings, with ``transfer.chunk`` and ``transfer.inline`` no larger than the broker at ``address`` takes.

    Our own broker takes everything, and is not asked. A broker that cannot be reached is tried again, ``attempts``
    times in all, for ever where that is 0: only it can tell.

    Raises:
        TransportError: it cannot be reached, or takes too little.
    """
    if not settings.broker.url:
        return settings
    for attempt in itertools.count(1):
        try:
            limit = await asyncio.to_thread(_limit, settings, address, tls)
            break
        except TransportError as error:
            if attempt == attempts:
                raise
            log(f"{error}; trying again")
        await asyncio.sleep(min(_LONGEST, _SHORTEST * 2.0 ** min(attempt, 16)))
    if limit is None:
        log(
            f"broker {address}: what the server publishes does not come back to it, so chunks of "
            f"{settings.transfer.chunk:,} bytes are not tried out; its user should read and write fedge/#"
        )
        return settings
    return _within(settings, address, limit, log)


def _most(transfer: Transfer) -> int:
    return max(transfer.chunk, transfer.inline) + OVERHEAD


def _limit(settings: Federation, address: Address, tls: Tls | None) -> int | None:
    token = secrets.token_hex(4)
    root = f"fedge/{settings.federation.name}/probe/{token}"
    return largest_payload(address, f"fs-{token}", root, _most(settings.transfer), tls)


def _within(settings: Federation, address: Address, limit: int, log: Callable[[str], None]) -> Federation:
    transfer = settings.transfer
    if limit >= _most(transfer):
        return settings
    if limit < LEAST:
        raise TransportError(
            f"broker {address} takes messages of at most {limit:,} bytes; fedge needs {LEAST:,}: raise its limit"
        )
    chunk, inline = fitting(limit, transfer.chunk), fitting(limit, transfer.inline)
    log(
        f"broker {address} takes messages of {limit:,} bytes: chunks have at most {chunk:,}, "
        f"and what travels within a message {inline:,}"
    )
    return msgspec.structs.replace(settings, transfer=msgspec.structs.replace(transfer, chunk=chunk, inline=inline))
