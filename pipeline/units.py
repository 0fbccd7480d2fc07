"""Numbers as a person reads them: sizes, durations, shares, changes, and small ones with a power of ten."""

import math

UNITS = ("bytes", "kB", "MB", "GB", "TB")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
TIMES = "\N{MULTIPLICATION SIGN}"
SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold: 144,811,552 is 145 MB."""
    power = min(len(UNITS) - 1, int(math.log10(count) // 3)) if count >= 1 else 0
    value = count / 1000**power
    if round(value) == 1000 and power + 1 < len(UNITS):
        value, power = 1.0, power + 1
    return f"{value:.{1 if power and value < 10 else 0}f}{SPACE}{UNITS[power]}"


def duration(seconds: float) -> str:
    """Seconds, then minutes and seconds, then hours and minutes."""
    if round(seconds, 1) < 10:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{SPACE}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest}{SPACE}s" if rest else f"{minutes}{SPACE}min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours}{SPACE}h {minutes}{SPACE}min"


def share(part: float) -> str:
    """A part of one in percent; what is not all is never rounded to 100%, nor what is not nothing to 0%."""
    if 0.999 < part < 1:
        return ">99.9%"
    return "<0.1%" if 0 < part < 0.001 else f"{100 * part:.0f}%" if part in (0, 1) else f"{100 * part:.1f}%"


def number(value: float) -> str:
    """Whole numbers whole, others to three significant digits; below a thousandth with a power of ten."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    rounded = f"{value:.2e}"
    digits, power = rounded.split("e")
    if int(power) < -3:
        return f"{digits}{SPACE}{TIMES}{SPACE}10{str(int(power)).translate(SUPERSCRIPT)}"
    return f"{float(rounded):.{max(0, 2 - int(power))}f}"


def figure(value: float, unit: str) -> str:
    """A value in its unit: a share in percent, points of 100 with one decimal."""
    shown = share(abs(value)) if unit == "share" else f"{abs(value):.1f}" if unit == "points" else number(abs(value))
    return (MINUS if value < 0 and shown.strip("0.%") else "") + shown


def change(value: float, unit: str) -> str:
    """A difference, with its sign; of shares in points of a hundred, so that nobody takes it for a ratio."""
    shown = figure(100 * value, "points") if unit == "share" else figure(value, unit)
    return shown if shown.startswith(MINUS) or not shown.strip("0.") else f"+{shown}"


def power(value: float) -> str:
    """A power of ten: 0.001, below that 10 with its exponent."""
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"10{str(round(math.log10(value))).translate(SUPERSCRIPT)}"


def bars(lengths: list[tuple[int, int]]) -> list[tuple[str, int, float]]:
    """(tokens, conversations, length of 0 to 1) of each bar of a histogram, given where it ends and what it counts."""
    widest = max((count for _, count in lengths), default=1)
    lows = [0, *(end + 1 for end, _ in lengths)]
    return [
        (f"{low:,} to {end:,}" if low else f"up to {end:,}", count, count / widest)
        for low, (end, count) in zip(lows, lengths, strict=False)
    ]
