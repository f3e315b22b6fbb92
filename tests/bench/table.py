"""The training benchmark's results as tables for the README."""

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each case and number of threads, then the sums and what training takes beside time."""
    return "\n\n".join(part for part in (_steps(result), _summary(result), _failed(result)) if part) + "\n"


def _steps(result: dict[str, Any]) -> str:
    cases = result.get("cases", [])
    if not cases:
        return ""
    beside = {
        "spin": "fedge --spin",
        "compile": "torch.compile",
        "channels_last": "channels-last",
        "executorch": "ExecuTorch",
        "ort_training": "onnxruntime-training",
    }
    shown = {name: title for name, title in beside.items() if any(case.get(f"{name}_step_ms") for case in cases)}
    head = ["one step, batch 32", "threads", "fedge", "PyTorch", "ratio (quartiles)", *shown.values(), "of the limit"]
    rows = [head, ["---"] * len(head)]
    for case in cases:
        low, high = case["ratio_quartiles"]
        ratio = f"{case['ratio']:.2f} ({low:.2f} to {high:.2f})"
        others = [_ms(case.get(f"{name}_step_ms")) for name in shown]
        times = [_ms(case["step_ms"]), _ms(case["torch_step_ms"])]
        rows.append([case["title"], str(case["threads"]), *times, ratio, *others, f"{case['of_limit']:.0%}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _summary(result: dict[str, Any]) -> str:
    rows = [
        [title, "", "", f"{result[key]:.2f}"]
        for key, title in (
            ("geomean_ratio_1", "step time, 1 thread, geometric mean"),
            ("geomean_ratio_2", "step time, 2 threads, geometric mean"),
            ("geomean_ratio_2_spin", "step time, 2 threads, `--spin`, geometric mean"),
            ("max_ratio", "step time, worst case"),
        )
        if result.get(key)
    ]
    for title, ours, theirs, ratio, scale, unit in (
        ("peak resident memory", "rss_bytes", "torch_rss_bytes", "rss_ratio", 2**20, "MiB"),
        ("start to first finished step", "cold_start_s", "torch_cold_start_s", "cold_start_ratio", 1e-3, "ms"),
        ("installed size", "install_bytes", "torch_install_bytes", "install_ratio", 1e6, "MB"),
    ):
        if ratio in result:
            sizes = [f"{result[key] / scale:,.0f} {unit}" for key in (ours, theirs)]
            rows.append([title, *sizes, f"{result[ratio]:.2f}"])
    if not rows:
        return ""
    rows = [["", "fedge", "PyTorch", "ratio"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _failed(result: dict[str, Any]) -> str:
    return "\n".join(f"- {name} failed: {error}" for name, error in result.get("failed", {}).items())


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"
