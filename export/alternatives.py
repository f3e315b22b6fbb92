"""What to use instead of an operator that has no rule."""

import difflib
from collections.abc import Collection

_ADVICE: dict[tuple[str, ...], str] = {
    ("logcumsumexp",): "torch.logsumexp over prefixes, or torch.cumsum of exponentials",
    ("atan2",): "torch.atan of the quotient",
    ("as_strided", "as_strided_scatter"): "slicing, Tensor.unfold or Tensor.reshape",
    ("masked_select", "nonzero", "unique", "_unique2"): "torch.where or a product with the mask, which keep the size",
    ("masked_scatter",): "torch.where",
    ("bucketize", "searchsorted"): "a sum of comparisons with the boundaries",
    ("_cdist_forward", "_cdist_backward", "_pdist_forward"): "torch.linalg.norm of differences",
    ("_ctc_loss",): "cross-entropy over aligned labels",
    ("_fft_r2c", "_fft_c2c", "_fft_c2r", "stft"): "a product with a constant matrix of sines and cosines",
    ("bernoulli", "rand", "rand_like", "randn", "randn_like", "multinomial", "normal"): "torch.nn.Dropout, or an input",
    ("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"): "padding_mode='zeros'",
    ("replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward"): "padding_mode='zeros'",
    ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"): "torch.nn.MaxPool with fixed windows",
    ("fractional_max_pool2d", "fractional_max_pool3d"): "torch.nn.MaxPool with fixed windows",
    ("upsample_bicubic2d", "upsample_bicubic2d_backward", "upsample_trilinear3d"): "nearest or bilinear upsampling",
    ("grid_sampler_2d", "grid_sampler_2d_backward"): "bilinear upsampling, or a convolution",
    ("_embedding_bag", "_embedding_bag_forward_only"): "torch.nn.Embedding and a sum or mean over it",
    ("svd", "_linalg_svd", "linalg_eigh", "_linalg_eigh", "linalg_inv_ex", "linalg_qr"): "an iteration of torch.matmul",
    ("_scaled_dot_product_flash_attention_for_cpu",): "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
}


def nearest(name: str, rules: Collection[str]) -> str:
    """The nearest covered alternative to the ATen operator ``name`` (``aten.cumprod``), in words; or nothing."""
    bare = name.removeprefix("aten.")
    for operators, advice in _ADVICE.items():
        if bare in operators:
            return advice
    # Only operators of the same family are alike for a user: log1p is near log2, which is no help.
    root = bare.strip("_").split("_")[0]
    close = difflib.get_close_matches(name, [rule for rule in rules if root in rule and not _internal(rule)], 1, 0.6)
    return close[0] if close else ""


def _internal(rule: str) -> bool:
    return rule.endswith(("_backward", "_backward_data")) or rule.startswith("aten._")
