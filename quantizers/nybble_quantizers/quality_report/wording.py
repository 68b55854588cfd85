"""Records in words: methods, forms and formats by their names, numbers in fitting precision."""

from __future__ import annotations

from collections.abc import Iterable

from nybble_models.errors import ModelError
from nybble_models.formats.overrides import Summary, for_linear, summary
from nybble_quantizers.quality_report.record import Record, text

METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "awq+gptq": "AWQ + GPTQ",
    "rtn": "round-to-nearest",
    "smoothquant": "SmoothQuant",
    "smoothquant+gptq": "SmoothQuant + GPTQ",
    "fp8": "FP8",
    "none": "16-bit",
}
UNKNOWN = "n/a"


def method(record: Record) -> str:
    return METHODS.get(record.method, record.method) or "unknown method"


def label(record: Record) -> str:
    """ "AWQ 4-bit g64": enough to tell checkpoints of one model apart."""
    how, what = method(record), form(record)
    return what if what.startswith(how) else f"{how} {what}"


def form(record: Record) -> str:
    """ "4-bit g64", "4-bit g128 symmetric", "3 and 4-bit g64", "8-bit, 8-bit inputs", "FP8, 8-bit inputs"."""
    if not record.rows:
        return "16-bit"
    rule = _rule(record)
    groups = {row.group_size for row in record.rows if row.group_size}
    parts = [_floats(record) or f"{listed(bits_of(record))}-bit"]
    if rule.group_size and groups:
        parts.append(f"g{listed(groups)}")
    if rule.symmetric and rule.input_bits is None:
        parts.append("symmetric")
    return " ".join(parts) + (f", {rule.input_bits}-bit inputs" if rule.input_bits else "")


def bits_of(record: Record) -> list[int]:
    return sorted({row.bits for row in record.rows if row.bits is not None})


def storage(record: Record) -> str:
    """The format of the file: "AWQ (GEMM)", "GPTQ v2", "compressed-tensors (pack-quantized)"."""
    found = record.settings
    kind = text(found.get("quant_method"))
    if kind == "awq":
        return f"AWQ ({text(found.get('version')).upper() or 'GEMM'})"
    if kind == "gptq":
        return "GPTQ v2" if found.get("checkpoint_format") == "gptq_v2" else "GPTQ v1"
    if kind == "compressed-tensors":
        return f"compressed-tensors ({text(found.get('format')) or 'unknown'})"
    return kind or "plain safetensors"


def _rule(record: Record) -> Summary:
    try:
        return summary(record.settings)
    except (ModelError, AttributeError, KeyError, TypeError):  # settings of any shape may have been read
        return Summary(None, None, None)


def _floats(record: Record) -> str | None:
    try:
        weights = for_linear(record.settings, "").get("weights") or {}
        return "FP8" if weights.get("type") == "float" else None
    except (ModelError, AttributeError, KeyError, TypeError):
        return None


def listed(numbers: Iterable[int]) -> str:
    """ "4", "3 and 4", "3, 4 and 8"."""
    *rest, last = [str(each) for each in sorted(numbers)] or [UNKNOWN]
    return f"{', '.join(rest)} and {last}" if rest else last


def size(nbytes: float | None) -> str:
    """In powers of ten, as disks are sold."""
    if nbytes is None:
        return UNKNOWN
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"


def figure(value: float | None, pattern: str = "{:.2f}") -> str:
    return UNKNOWN if value is None else pattern.format(value)


def share(value: float | None, signed: bool = False) -> str:
    """0.0123 as "1.23 %"; `signed` for a rise, which may be a fall."""
    return UNKNOWN if value is None else f"{100 * value:{'+' if signed else ''}.2f} %"


def interval(ends: tuple[float, float] | None, pattern: str, scale: float = 1.0) -> str:
    """ "0.0119 to 0.0127"; empty where there is none."""
    return "" if ends is None else " to ".join(pattern.format(scale * end) for end in ends)
