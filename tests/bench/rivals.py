"""What other codecs make of an update, measured once for each vector and kept, whatever becomes of fedge's codec."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from contenders import eden, plain, qsgd, stc
from contenders.points import Point
from federations import BUILD, BenchError, command, write_json
from parts import Parts
from peers import Environment, Peer
from stored import Update

HERE = Path(__file__).parent / "contenders"
KEPT = BUILD / "bench" / "contenders.json"

NNCODEC = "nncodec"
DEFAULT = "nncodec_default"
"""NNCodec as its own interface calls it. That of its coder has a rate-distortion weight besides, which helps it."""
_FINE = "nncodec_fine"
_PEER = Peer(("numpy<2", "pybind11", "setuptools", "wheel"), "contenders/nncodec_points.py", ("nncodec==2.1.3",))
_STEPS = np.geomspace(0.06, 32, 15).tolist()
_FINER = np.geomspace(0.004, 0.042, 6).tolist()
"""Steps for vectors of which few values are large, so that they too take as many bits as are of interest."""
_MOST = 4.2
_WEIGHTS = (0.5, 1.0)

CODECS: dict[str, Callable[[Update], list[Point]]] = {
    "stc": lambda update: stc.points(update.vector, update.sizes),
    "eden": lambda update: eden.points(update.vector),
    "qsgd": lambda update: qsgd.points(update.vector),
    "int8_zstd": lambda update: plain.int8_zstd(update.vector, update.sizes),
    "fp16": lambda update: plain.fp16(update.vector),
}
NAMES = (NNCODEC, *CODECS)
_SOURCES = {name: f"{name}.py" for name in ("stc", "eden", "qsgd")} | dict.fromkeys(("int8_zstd", "fp16"), "plain.py")
_SOURCES |= dict.fromkeys((NNCODEC, DEFAULT, _FINE), "nncodec_points.py")


class Rivals:
    """Those of ``NAMES`` that are wanted, on files that `stored.Update` wrote; ``failed`` says why one is missing."""

    def __init__(self, wanted: list[str]) -> None:
        self.failed: dict[str, str] = {}
        self._wanted = wanted
        self._parts = Parts(KEPT, {"nncodec": [_STEPS, _WEIGHTS]}, fresh=False)
        self._environment = Environment(NNCODEC, _PEER, BUILD / "bench" / "peers")

    def points(self, path: Path) -> dict[str, list[Point]]:
        """Bits and distortion at all settings, by codec."""
        update = Update.read(path)
        found = {
            name: self._once(name, update, partial(CODECS[name], update)) for name in CODECS if name in self._wanted
        }
        if NNCODEC in self._wanted and NNCODEC not in self.failed:
            try:
                found[DEFAULT] = self._once(DEFAULT, update, partial(self._nncodec, path, _STEPS, (0.0,)))
                more = self._once(NNCODEC, update, partial(self._nncodec, path, _STEPS, _WEIGHTS))
                if max(bits for bits, _ in found[DEFAULT]) < _MOST:
                    found[DEFAULT] += self._once(_FINE, update, partial(self._nncodec, path, _FINER, (0.0,)))
                found[NNCODEC] = found[DEFAULT] + more
            except BenchError as error:
                self.failed[NNCODEC] = str(error)
        return found

    def _once(self, name: str, update: Update, measure: Callable[[], list[Point]]) -> list[Point]:
        state = hashlib.sha256((HERE / _SOURCES[name]).read_bytes() + update.vector.tobytes())
        kept = self._parts.get(f"{name} {state.hexdigest()[:16]}", measure, say=lambda points: f"{len(points)} points")
        return [(bits, nmse) for bits, nmse in kept]

    def _nncodec(self, path: Path, steps: list[float], weights: tuple[float, ...]) -> list[Point]:
        python, folder = self._environment.python(), KEPT.parent / NNCODEC
        request, answer = folder / "request.json", folder / "answer.json"
        settings = [{"use_dq": True, "row_skipping": True, "lambda_scale": weight} for weight in weights]
        write_json(request, {"updates": [[str(path), steps]], "settings": settings})
        program = [str(python), str(HERE / "nncodec_points.py"), str(request), str(answer)]
        command(program, folder / "log.txt", timeout=3600.0)
        (points,) = json.loads(answer.read_text())
        return [(bits, nmse) for bits, nmse in points]
