"""Reports as text for people: aligned tables whose lines survive `grep`, no colours, no boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm_vitq.explain import chosen_sites, granularity_text, parameters_text, sqnr_text
from tvm_vitq.plan import QuantPlan

if TYPE_CHECKING:
    from tvm_vitq.comparison import Comparison

GAP = "  "


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; those that hold only numbers (or "-") align right.

    Every cell is shown by `str`; floats should come formatted.
    """
    cells = [list(map(str, headers)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    right = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(headers))]
    lines = []
    for row in cells:
        aligned = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append(GAP.join(aligned).rstrip())
    return "\n".join(lines)


def fields(pairs: Mapping[str, object]) -> str:
    """One "name  value" line each, values in one column."""
    width = max((len(name) for name in pairs), default=0)
    return "\n".join(f"{name.ljust(width)}{GAP}{value}".rstrip() for name, value in pairs.items())


def size(count: int) -> str:
    """Bytes in the largest unit that keeps at least one digit before the point: "830 B", "1.21 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def report_text(report: Mapping[str, Any]) -> str:
    """A report of quantization or build: coverage, sizes, every kernel with its instruction, warnings.

    Fields that the report does not have are left out.
    """
    islands = report["float_islands"]
    calibration = report["calibration"]
    count = report["weight_count"]
    per_weight = f", {report['weight_bytes'] / count:.2f} bytes per weight" if count else ""
    head = {
        "model": f"{report['model']}  {'x'.join(map(str, report['input_shape']))}",
        "quantization": f"{report['bits']} {report['recipe']}  plan {report['plan_hash']}",
        "integer coverage": f"{100 * report['integer_coverage']:.2f} % of {report['macs'] / 1e6:.1f} M MACs",
        "float operators": ", ".join(f"{i['name']} ({i['op']}: {i['reason']})" for i in islands) or "none",
        "constants": f"{size(report['weight_bytes'])}{per_weight}",
        "calibration": calibration["source"],
    }
    if "target" in report:
        tuned = sum(kernel["schedule"] == "tuned" for kernel in report["kernels"])
        head["target"] = f"{report['isa']}  ({report['target']})"
        head["kernels"] = f"{len(report['kernels'])}: {tuned} tuned, {len(report['kernels']) - tuned} default"
        head["compile time"] = f"{report['compile_seconds']} s"
    if "output" in report:
        head["written"] = report["output"]
    if "file_bytes" in report:
        head["file size"] = size(report["file_bytes"])
    parts = [fields(head), kernels_text(report.get("kernels", ())), *vta_texts(report.get("vta"))]
    parts += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(part for part in parts if part)


def kernels_text(kernels: Sequence[Mapping[str, Any]]) -> str:
    """The kernels of a report: calls per inference, MACs of all calls, dot-product instruction, schedule."""
    if not kernels:
        return ""
    rows = [
        (k["name"], k["calls"], f"{k['macs'] * k['calls'] / 1e6:.2f}", k["instruction"], k["schedule"])
        for k in kernels
    ]
    return table(("kernel", "calls", "M MACs", "instruction", "schedule"), rows)


def vta_texts(vta: Mapping[str, Any] | None) -> list[str]:
    """Launches of VTA: cycles, share of them in which the multipliers do what the model asks for, and in
    which each stage works, bytes of device memory; and what stays on the host.
    """
    if vta is None:
        return []
    head = {
        "VTA": f"{vta['config']['TARGET']} {vta['name']}, {len(vta['launches'])} launches",
        "cycles": f"{vta['cycles']} by the cycle model, {vta['milliseconds']:.3f} ms at "
        f"{vta['megahertz']} MHz",
        "utilization": f"{100 * vta['utilization']:.1f} % of the multipliers",
    }
    rows = [
        (
            row["name"],
            f"{row['macs'] / 1e6:.2f}",
            row["cycles"],
            f"{100 * row['utilization']:.1f} %",
            *(f"{100 * row['busy'][stage]:.0f} %" for stage in ("load", "compute", "store")),
            size(sum(row["read"].values())),
            size(row["written"]),
            row["schedule"],
        )
        for row in vta["launches"]
    ]
    headers = (
        "launch",
        "M MACs",
        "cycles",
        "utilization",
        "load",
        "compute",
        "store",
        "read",
        "written",
        "tile",
    )
    kept = [f"on the host: {layer}: {reason}" for layer, reason in vta["on_host"].items()]
    return [fields(head), table(headers, rows), *kept]


def tuning_text(found: Mapping[str, Any]) -> str:
    """What a tuning run found: times of a call under the default and the best schedule."""
    rows = []
    for row in found["kernels"]:
        default, best = row["default"], row["best"]
        times = [f"{1e6 * t:.1f}" if t else "-" for t in (default, best)]
        ratio = f"{best / default:.3f}" if default and best else "-"
        picked = row["schedule"] or {}
        text = " ".join(f"{name}={value}" for name, value in picked.items()) if best else "-"
        rows.append(
            (row["kernel"], row["calls"], row["trials"], row["failed"], *times, ratio, text or "default")
        )
    headers = ("kernel", "calls", "trials", "failed", "default us", "best us", "ratio", "schedule")
    both = [row for row in found["kernels"] if row["default"] and row["best"]]
    before, after = (sum(row["calls"] * row[which] for row in both) for which in ("default", "best"))
    total = {"records": found["path"], "trials": found["trials"]}
    if both:
        total["all calls"] = f"{1e3 * before:.3f} ms default, {1e3 * after:.3f} ms tuned"
    wrong = [f"WRONG RESULT: {w['kernel']} {w['schedule']}: {w['error']}" for w in found["wrong"]]
    return "\n".join([table(headers, rows), fields(total), *wrong])


def plan_text(plan: QuantPlan, site: str | None = None) -> str:
    """A plan: where it came from, then one line per site, of those that match the pattern `site` if it is
    given.
    """
    calibration = plan.calibration
    head = {
        "model": plan.model,
        "input": "x".join(map(str, plan.input_shape)),
        "quantization": f"{plan.bits} {plan.recipe}  requantize {plan.requantize}  plan {plan.hash}",
        "calibration": f"{calibration.source}, seed {calibration.seed}",
        "sites": f"{len(plan.sites)} quantizers, {len(plan.aliases)} shared",
    }
    if plan.comment:
        head["comment"] = plan.comment
    shown = chosen_sites(plan, site)
    rows = [(name, *_site_cells(plan, name)) for name in shown]
    rows += [(name, "=", owner, *[""] * 5) for name, owner in plan.aliases.items() if owner in shown]
    notes = [f"note: {where}: {note}" for where, note in plan.notes.items()]
    headers = ("site", "codec", "bits", "granularity", "scale", "zero point", "SQNR dB", "parameters")
    return "\n".join([fields(head), table(headers, rows), *notes])


def _site_cells(plan: QuantPlan, name: str) -> tuple[str, ...]:
    site = plan.sites[name]
    return (
        f"{site.codec}{' signed' if site.signed else ''}{' dynamic' if site.dynamic else ''}",
        str(site.bits),
        granularity_text(site),
        _span(site.scale, ".3g"),
        _span(site.zero_point, "d"),
        sqnr_text(plan, name),
        parameters_text(site),
    )


def _span(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}..{high}"


def _is_number(text: str) -> bool:
    bare = text.removesuffix(" %").replace(",", "")
    try:
        float(bare)
    except ValueError:
        return text in ("", "-")
    return True


def comparison_text(found: Comparison) -> str:
    """Accuracy of several forms of a model, one line each."""
    rows = []
    for row in found.rows:
        accuracy = row.accuracy
        equal = "-" if row.equal_logits is None else f"{row.equal_logits}/{accuracy.logits.size}"
        rows.append(
            (
                row.name,
                f"{accuracy.top1:.2f} %",
                f"{accuracy.correct}/{accuracy.count}",
                f"{accuracy.interval:.1f}",
                "-" if row.flips is None else row.flips,
                equal,
            )
        )
    header = ("model", "top-1", "correct", "+-", "flips", "equal logits")
    return f"data  {found.data}\n{table(header, rows)}"


def bench_text(data: Mapping[str, Any]) -> str:
    """Latency and the time of every kernel of `vitq bench`."""
    head = {
        "library": f"{data['library']}  ({data['model']})",
        "latency": f"median {data['median_ms']:.3f} ms, p10 {data['p10_ms']:.3f}, p90 {data['p90_ms']:.3f}, "
        f"min {data['min_ms']:.3f}, mean {data['mean_ms']:.3f}",
        "measured": f"{data['runs']} runs, batch {data['batch']}, {data['threads']} threads, "
        f"{data['images_per_second']:.0f} images/s",
    }
    if "note" in data:
        head["note"] = data["note"]
    total = sum(kernel["milliseconds"] for kernel in data["kernels"]) or 1.0
    rows = [
        (
            k["name"],
            k["calls"],
            f"{k['milliseconds']:.4f}",
            f"{100 * k['milliseconds'] / total:.1f} %",
            k["instruction"] or "-",
        )
        for k in data["kernels"]
    ]
    return f"{fields(head)}\n{table(('kernel', 'calls', 'ms', 'share', 'instruction'), rows)}"
