"""A fleet whose phones take as long to train as their speed says, whatever else the machine does.

``simulate(..., fleet="tests.bench.learning.phones")``. The emulator multiplies what training took on this machine, and
with it what it waited for others on the same cores, so that phones asked at the same moment are slower than those asked
one by one. Here a phone of speed 1 takes ``FEDGE_TRAINING_SECONDS``, one of speed 0.1 ten times as long.
"""

import asyncio
import os

from edge_client.device import Device
from edge_client.emulator import __main__ as program
from edge_client.emulator import fleet
from edge_client.events import Failed, Finished, Work

GLANCE = 0.02
"""Seconds between looks whether the task was called off."""


class PacedPhone(fleet.Phone):
    """A phone whose trainings take their time; one that is called off ends, as on a device, at once."""

    async def _perform(self, work: Work) -> Finished | Failed:
        loop = asyncio.get_running_loop()
        due = loop.time() + float(os.environ["FEDGE_TRAINING_SECONDS"]) / self.profile.speed
        stop = self._stop
        answer = await Device._perform(self, work)
        while not stop.is_set() and loop.time() < due:  # noqa: ASYNC110 - the flag is a thread's
            await asyncio.sleep(min(GLANCE, max(0.0, due - loop.time())))
        return answer


if __name__ == "__main__":
    fleet.Phone = PacedPhone
    program.main()
