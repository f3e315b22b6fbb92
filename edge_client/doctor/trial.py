"""One training step on ONNX Runtime, in a process of its own: ``python -m edge_client.doctor.trial``.

On a processor that a build of the runtime was not made for the process dies of an illegal instruction, and whoever
started it lives to tell.
"""

import base64
import json
import time

import numpy as np

from edge_client import runtime

STEP = base64.b64decode(
    "CAk62wEKEQoBeAoBdxIBcCIGTWF0TXVsCg4KAXAKAXkSAWUiA1N1YgohCgF4EgJ4dCIJVHJhbnNwb3NlKg0KBHBlcm1AAUAAoAEHChIKAnh0CgFl"
    "EgFnIgZNYXRNdWwKDwoBZwoCbHISAXMiA011bAoSCgF3CgFzEgV3X25ldyIDU3ViEgRzdGVwWg8KAXgSCgoICAESBAoACgBaDwoBeRIKCggIARIE"
    "CgAKAFoPCgF3EgoKCAgBEgQKAAoAWgwKAmxyEgYKBAgBEgBiEwoFd19uZXcSCgoICAESBAoACgBCBAoAEBI="
)
"""An ONNX graph, opset 18: ``w_new = w - lr * x' (x w - y)``, a step of linear regression. A device has no onnx."""


def step(rows: int = 64, width: int = 64) -> tuple[float, float]:
    """Take a step; the largest difference from what numpy finds, and seconds."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(rows, width)).astype(np.float32), rng.normal(size=(width, 8)).astype(np.float32)
    y, rate = rng.normal(size=(rows, 8)).astype(np.float32), np.float32(0.01)
    made = runtime.session(STEP)
    began = time.perf_counter()
    (found,) = made.run(None, {"x": x, "y": y, "w": w, "lr": np.array(rate)})
    seconds = time.perf_counter() - began
    return float(np.abs(found - (w - rate * (x.T @ (x @ w - y)))).max()), seconds


if __name__ == "__main__":
    error, seconds = step()
    print(json.dumps({"version": runtime.VERSION, "error": error, "milliseconds": seconds * 1e3}))
