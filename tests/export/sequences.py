"""Published networks for sensors, sound and text, rebuilt from their papers."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Causal(nn.Module):
    """A residual block of the temporal convolutional network (Bai et al. 2018, arXiv 1803.01271)."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.first(F.pad(x, (self.pad, 0)))))
        y = self.drop(F.relu(self.second(F.pad(y, (self.pad, 0)))))
        return F.relu(y + self.skip(x))


class Tcn(nn.Module):
    """Four blocks, dilations 1 to 8: a class for the window."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        widths = (9, 24, 24, 24, 24)
        self.blocks = nn.Sequential(*(Causal(widths[i], widths[i + 1], 2**i) for i in range(4)))
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(x)[:, :, -1])
        return result


class DeepConvLstm(nn.Module):
    """Ordóñez and Roggen 2016 (Sensors 16, 115): convolutions over time, two LSTM layers, the last state."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(9, 32, 5), nn.ReLU(), nn.Conv1d(32, 32, 5), nn.ReLU(), nn.MaxPool1d(2))
        self.lstm = nn.LSTM(32, 48, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.features(x).transpose(1, 2))
        result: Tensor = self.head(states[:, -1])
        return result


class Tagger(nn.Module):
    """A bidirectional GRU with padding: a tag for each token (Huang et al. 2015, arXiv 1508.01991)."""

    def __init__(self, tokens: int = 60, tags: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, 24, padding_idx=0)
        self.gru = nn.GRU(24, 32, bidirectional=True, batch_first=True)
        self.head = nn.Linear(64, tags)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.gru(self.embed(x))[0])
        return result


class Encoder(nn.Module):
    """A small BERT (Devlin et al. 2018, arXiv 1810.04805): padding masked, the first token classified."""

    def __init__(self, tokens: int = 60, length: int = 24, d: int = 48, classes: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(tokens, d, padding_idx=0), nn.Embedding(length, d)
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.1, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.embed(x) + self.place(torch.arange(x.shape[1])))
        padding = F.pad(x[:, 1:] == 0, (1, 0), value=False)
        result: Tensor = self.head(torch.tanh(self.layers(hidden, src_key_padding_mask=padding)[:, 0]))
        return result


class Gpt(nn.Module):
    """A decoder with rotary positions (Su et al. 2021, arXiv 2104.09864), RMSNorm and SwiGLU, as Llama; tied head."""

    class Block(nn.Module):
        def __init__(self, d: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.before, self.after = nn.RMSNorm(d), nn.RMSNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, 2 * d), (d, 2 * d), (2 * d, d)))

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            n, t, d = x.shape
            q, k, v = self.qkv(self.before(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k = (u * cos + torch.cat([-u.chunk(2, -1)[1], u.chunk(2, -1)[0]], -1) * sin for u in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
            y = self.after(x)
            result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
            return result

    def __init__(self, tokens: int = 60, length: int = 32, d: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, d)
        self.blocks = nn.ModuleList(Gpt.Block(d, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, tokens, bias=False)
        self.head.weight = self.embed.weight
        angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(0, d // heads, 2) * heads / d)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        result: Tensor = self.head(self.norm(h))
        return result


class Spoken(nn.Module):
    """M5 (Dai et al. 2016, arXiv 1610.00087): words from the raw waveform, the first layer with 80 taps."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in ((1, 32, 80, 16), (32, 32, 3, 1), (32, 64, 3, 1)):
            layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x).mean(-1)).log_softmax(-1)
        return result


class Forecaster(nn.Module):
    """N-BEATS (Oreshkin et al. 2019, arXiv 1905.10437): stacks that explain what those before left over."""

    def __init__(self, past: int = 48, future: int = 12) -> None:
        super().__init__()
        self.past = past
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(past, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, past + future))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        forecast = x.new_zeros(())
        for block in self.blocks:
            y = block(x)
            x, forecast = x - y[:, : self.past], forecast + y[:, self.past :]
        return forecast


class Vae(nn.Module):
    """A variational autoencoder (Kingma and Welling 2013, arXiv 1312.6114) that takes its noise as an input."""

    def __init__(self, d: int = 20, code: int = 4) -> None:
        super().__init__()
        self.encode, self.decode = (
            nn.Linear(d, 2 * code),
            nn.Sequential(nn.Linear(code, 32), nn.ELU(), nn.Linear(32, d)),
        )

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, -1)
        return self.decode(mean + noise * torch.exp(log_variance / 2)), mean, log_variance


def elbo(outputs: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """Half the squared error and the divergence from the prior."""
    found, mean, log_variance = outputs
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1).mean() / 2
    return F.mse_loss(found, target) / 2 + divergence / math.prod(target.shape[1:])
