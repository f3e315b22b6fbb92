"""Windows of motion sensors, as for activity recognition from phones (Anguita et al. 2013, the UCI HAR data set)."""

from torch import Tensor, nn


def sensor_cnn() -> nn.Module:
    """1-D CNN: ``[N, 9, 128] float32`` (nine channels, 128 samples) -> ``[N, 6]`` logits; 65,606 parameters.

    Three convolutions with batch normalization, after the kind of Wang et al. 2017 (arXiv 1611.06455). ReLU comes after
    the pooling: the same function, on half of the values.
    """
    return nn.Sequential(
        *_stage(9, 64),
        *_stage(64, 64),
        *_stage(64, 128),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(128, 6),
    )


def _stage(channels: int, width: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv1d(channels, width, 5, padding=2, bias=False),
        nn.BatchNorm1d(width),
        nn.MaxPool1d(2),
        nn.ReLU(),
    )


class SensorLSTM(nn.Module):
    """One LSTM layer over the samples, linear read-out of its last state."""

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, T] float32`` -> ``[N, classes] float32``."""
        states, _ = self.lstm(x.transpose(1, 2))
        logits: Tensor = self.head(states[:, -1])
        return logits


def sensor_lstm() -> nn.Module:
    """LSTM (Hochreiter & Schmidhuber 1997): ``[N, 9, 128] float32`` -> ``[N, 6]`` logits; 19,590 parameters."""
    return SensorLSTM(9, 64, 6)
