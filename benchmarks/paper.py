"""The paper's cost table (Iurada et al. 2025): seconds an iteration, and GiB at the peak."""

COLUMNS = ("fwd-bwd", "step", "total", "peak")

_TABLE = {
    "ViT-B-32": {
        "nonlinear": (0.3608, 0.0114, 0.3722, 6.5),
        "linearized": (0.6858, 0.0103, 0.6961, 10.2),
        "l-lora": (0.3270, 0.0036, 0.3306, 5.3),
        "lota": (0.3289, 0.1269, 0.4558, 6.8),
        "talos": (0.1256, 0.0388, 0.1644, 4.7),
    },
    "ViT-L-14": {
        "nonlinear": (1.2174, 0.0156, 1.2330, 18.6),
        "linearized": (1.6200, 0.0262, 1.6462, 21.3),
        "l-lora": (0.5153, 0.0082, 0.5235, 9.7),
        "lota": (0.8438, 0.4449, 1.2887, 15.4),
        "talos": (0.1891, 0.1372, 0.3263, 7.8),
    },
    "T5-Large": {
        "nonlinear": (0.9047, 0.0894, 0.9941, 30.0),
        "linearized": (1.7683, 0.1170, 1.8853, 35.1),
        "l-lora": (0.7452, 0.0136, 0.7588, 18.2),
        "lota": (0.8526, 0.3842, 1.2368, 32.1),
        "talos": (0.4358, 0.0509, 0.4867, 12.1),
    },
}


def ratio(model: str, method: str, column: str) -> float | None:
    """The paper's figure of ``method`` / its figure of Non-linear FT; None for what the paper has not."""
    rows = _TABLE.get(model, {})
    if method not in rows or column not in COLUMNS:
        return None
    index = COLUMNS.index(column)
    return rows[method][index] / rows["nonlinear"][index]
