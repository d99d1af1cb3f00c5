"""The comparison as text."""

from __future__ import annotations

from typing import Any


def table(summary: dict[str, Any]) -> str:
    """For people."""
    state = summary["machine"]
    machine = f"{state['cpu']} ({state['family/model/stepping']}), {state['cores']} cores"
    lines = [
        f"{summary['model']}, batch {summary['batch']}, {summary['threads']} thread(s)",
        f"{machine}, load before {state['load']}: {' '.join(state['instructions'])}",
        ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "",
        f"{'engine':16}{'precision':19}{'wall ms':>9}{'p10–p90':>15}{'min':>8}{'cpu ms':>9}"
        f"{'× ' + str(summary['base']):>17}{'p10–p90':>13}{'SQNR dB':>9}  note",
    ]
    for row in summary["peers"]:
        head = f"{row['engine']:16}{row['precision']:19}"
        if "ratio" not in row:
            lines.append(f"{head}{row['status']}: {row['note']}")
            continue
        wall, cpu, ratio = row["wall_ms"], row["cpu_ms"], row["ratio"]
        lines.append(
            f"{head}{wall['median']:9.2f}{_range(wall, 1):>15}{row['min_ms']:8.2f}{cpu['median']:9.2f}"
            f"{ratio['median']:17.2f}{_range(ratio, 2):>13}{row['sqnr_db']:9.1f}  {row['note']}"
        )
    lines.append("")
    waited = summary["waited_for_a_core"]
    if waited is None:
        lines.append("Time spent waiting for a core is not known here; ratios are of wall time.")
    else:
        lines.append(f"Waited for a core: {waited:.1%} of the time; ratios are of {summary['clock']} time.")
    if summary["disturbed"] and summary["clock"] == "wall":
        lines.append("Other processes disturbed this run, and with several threads that cannot be taken out.")
    for goal in summary["goals"]:
        ratio, verdict = goal["ratio"], "met" if goal["met"] else "MISSED"
        lines.append(
            f"{summary['base']} / {goal['against']}: {ratio['median']:.2f} ({_range(ratio, 2)}), "
            f"goal at most {goal['at_most']}: {verdict}"
        )
    return "\n".join(lines)


def _range(spread: dict[str, float], digits: int) -> str:
    return f"{spread['p10']:.{digits}f}–{spread['p90']:.{digits}f}"
