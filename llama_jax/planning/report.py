"""A plan as text for people and as JSON for programs."""

import dataclasses
from typing import Any

from llama_jax.planning import calibration
from llama_jax.planning.estimate import ASSUMPTIONS, Plan

_G = 2**30


def as_json(plan: Plan, run: dict[str, float]) -> dict[str, Any]:
    """The plan's fields, with `collective_bytes`, the run, and what the estimate rests on and how far off it was elsewhere."""
    return {
        **dataclasses.asdict(plan), "collective_bytes": plan.collective_bytes, "run": run, "assumptions": ASSUMPTIONS,
        "calibration": calibration.as_json(),
    }  # fmt: skip


def one_line(plan: Plan) -> str:
    """For a list of plans."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    head = f"{mesh:32} remat={plan.remat:9} microbatches={plan.microbatches:<4}"
    memory = f"{plan.hbm_bytes_per_chip / _G:6.1f} of {plan.hbm_capacity_bytes / _G:.1f} GiB"
    if not plan.fits or plan.step_seconds is None:
        return f"{head} {memory}  does not fit"
    return f"{head} {memory}  {plan.step_seconds:7.2f} s  {plan.tokens_per_second_per_chip:7.0f} tok/s/chip  MFU {plan.mfu:.1%}"


def as_text(plan: Plan, run: dict[str, float]) -> str:
    """The whole plan."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.program}, {plan.model}, on {plan.topology} ({plan.chips} chips): {mesh}",
        f"{plan.batch_size} rows, {plan.tokens_per_step:,} tokens a step, {plan.microbatches} microbatches, remat {plan.remat}",
        "",
        "memory per chip (GiB)",
        *(f"  {name:12} {size / _G:8.2f}" for name, size in plan.memory.items()),
        f"  {'total':12} {plan.hbm_bytes_per_chip / _G:8.2f} of {plan.hbm_capacity_bytes / _G:.2f}: {_verdict(plan)}",
    ]
    if plan.step_seconds is None:
        return "\n".join(lines)
    chips = plan.chips
    lines += [
        "",
        "arithmetic per chip and step (TFLOP)",
        f"  {'model':12} {_figure(plan.model_flops_per_step / chips / 1e12):>8}"
        f"   ({_figure(plan.full_attention_flops_per_step / chips / 1e12)} with full attention)",
        f"  {'executed':12} {_figure(plan.executed_flops_per_step / chips / 1e12):>8}"
        f"   ({plan.executed_flops_per_step / plan.model_flops_per_step - 1:+.0%}: recomputation, masked pairs)",
        f"  memory traffic {_figure(plan.memory_traffic_bytes / 1e9)} GB",
        "",
        "communication per device and step",
    ]
    for part in plan.traffic:
        if part.bytes > 2**20:
            beside = "beside arithmetic" if part.overlapped else "exposed"
            lines.append(
                f"  {part.axes:18} {part.kind:18} {part.dtype:5} x{part.count:<5} {part.bytes / 1e9:9.3f} GB "
                f"{part.seconds * 1e3:8.1f} ms  {beside}"
            )
    lines += [
        "",
        "time per step",
        f"  fusions {_figure(plan.fusion_seconds)} s + attention kernels {_figure(plan.kernel_seconds)} s "
        f"+ exposed communication {_figure(plan.exposed_seconds)} s = {_figure(plan.step_seconds)} s "
        f"(roofline {_figure(plan.roofline_seconds)} s)",
        f"  {plan.tokens_per_second_per_chip:,.0f} tokens/s/chip, MFU {plan.mfu:.1%} "
        f"({plan.mfu_full_attention:.1%} counting full attention)",
    ]
    if run:
        trillions = run["tokens"] / 1e12
        lines += ["", f"for {trillions:g}T tokens" if trillions >= 0.1 else f"for {trillions * 1e3:g}B tokens"]
        lines.append(f"  {_figure(run['days'])} days, {_figure(run['chip_hours'])} chip hours")
        if "dollars" in run:
            lines.append(f"  {_figure(run['dollars'])} US dollars")
        if "tco2eq" in run:
            lines.append(f"  {_figure(run['tco2eq'])} tCO2eq (the paper's Table 2: hours x watts x 1.1 x 0.385 t/MWh)")
    return "\n".join(lines)


def assumptions() -> str:
    """What every estimate rests on."""
    return "\n".join(["assumed", *(f"  - {line}" for line in ASSUMPTIONS)])


def _figure(value: float) -> str:
    """Four digits that count, of a test's seconds as of a pod's months."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _verdict(plan: Plan) -> str:
    spare = plan.hbm_capacity_bytes - plan.hbm_bytes_per_chip
    return f"fits, {spare / _G:.2f} spare" if plan.fits else f"does not fit, {-spare / _G:.2f} too much"
