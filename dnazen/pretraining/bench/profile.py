"""What a profiler's events come to: costly kernels, and where the GPU waits for the host."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

from dnazen.files import write_json

PROFILED_STEPS = 3
LARGEST_TRACE = 16 * 2**20  # bytes, compressed; a larger one is not kept


def idle_gaps(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Times between the first start and the last end that no `(start, end)` covers, in order."""
    gaps, covered = [], None
    for start, end in sorted(spans):
        if covered is not None and start > covered:
            gaps.append((covered, start))
        covered = end if covered is None else max(covered, end)
    return gaps


def summarize_profile(events: Iterable[Any], num_steps: int) -> dict[str, Any]:
    """What a profiler's events come to, for one of `num_steps` steps.

    Returns:
        `expensive`: the ten kernels (without a GPU: operators, without what they call) that take longest together, with
        `calls` and `ms`. `busy_ms`, `idle_ms` of the GPU, and `gaps`: the ten operators of the host in whose course, or
        in Python between operators, the GPU was idle longest. The last three are None without a GPU.
    """
    # a step's own mark covers everything
    host = [e for e in events if e.device_type == DeviceType.CPU and not e.name.startswith("ProfilerStep")]
    device = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    costs: dict[str, list[float]] = {}
    for event in device or host:
        cost = costs.setdefault(event.name, [0, 0.0])
        cost[0] += 1
        cost[1] += event.time_range.elapsed_us() if device else event.self_cpu_time_total
    summary = {"steps": num_steps, "unit": "kernel" if device else "operator", "expensive": _largest(costs, num_steps)}
    if not device:
        return {**summary, "busy_ms": None, "idle_ms": None, "gaps": None}
    spans = [(event.time_range.start, event.time_range.end) for event in device]
    gaps = idle_gaps(spans)
    idle = sum(end - start for start, end in gaps)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    # the outermost operator says more than the launch in its depth
    starts, ends = (np.array([getattr(event.time_range, name) for event in host]) for name in ("start", "end"))
    waits: dict[str, list[float]] = {}
    for start, end in gaps:
        middle = (start + end) / 2
        covering = np.flatnonzero((starts <= middle) & (middle <= ends))
        outermost = max(covering, key=lambda index: ends[index] - starts[index], default=None)
        wait = waits.setdefault("Python" if outermost is None else host[outermost].name, [0, 0.0])
        wait[0] += 1
        wait[1] += end - start
    times = {"busy_ms": (whole - idle) / 1e3 / num_steps, "idle_ms": idle / 1e3 / num_steps}
    return {**summary, **times, "gaps": _largest(waits, num_steps)}


def _largest(costs: dict[str, list[float]], num_steps: int) -> list[dict[str, Any]]:
    """The ten names with most microseconds, per step."""
    ordered = sorted(costs.items(), key=lambda item: -item[1][1])[:10]
    return [{"name": name, "calls": calls / num_steps, "ms": us / 1e3 / num_steps} for name, (calls, us) in ordered]


def write_profile(profiler: torch.profiler.profile, folder: str) -> None:
    """`profile.json` (`summarize_profile`) and, unless it is large, `trace.json.gz` for Chrome's viewer or Perfetto."""
    trace = Path(folder) / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    if trace.stat().st_size > LARGEST_TRACE:
        trace.unlink()
    summary = {**summarize_profile(profiler.events(), PROFILED_STEPS), "trace": trace.name if trace.exists() else None}
    write_json(Path(folder) / "profile.json", summary)
