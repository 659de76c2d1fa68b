"""Figures of what `grpo_result.py` measured: every arm, changes against the start, the line through start and arm."""

import matplotlib.pyplot as plt

from vitomr.figures import PALETTE, bare, interval_bars
from vitomr.grpo import arm_colour


def plot_results(results: dict) -> plt.Figure:
    "Every figure of every arm that has been measured, with its interval."
    arms = results["arms"]
    names = list(next(iter(arms.values()))["metrics"])
    size = 3 * len(names), 0.6 + 0.3 * len(arms)
    fig, axes = plt.subplots(1, len(names), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names):
        rows = [(arm, *(100 * a["metrics"][name][k] for k in ("value", "low", "high"))) for arm, a in arms.items()]
        interval_bars(ax, rows, [arm_colour(arm) for arm in arms])
        ax.set_title(f"{name}, %", fontsize=9, loc="left")
    return fig


def changes(results: dict) -> list[str]:
    "The relative change of TEDn of each arm, paired over excerpts; below zero it reads better."
    lines = []
    for arm, about in results["arms"].items():
        for against in ("start", "supervised", "taught"):
            if arm != "start" and (c := about.get(f"TEDn_against_{against}")):
                numbers = f"{100 * c['value']:+.1f} % ({100 * c['low']:+.1f} to {100 * c['high']:+.1f})"
                lines.append(f"{arm:14} TEDn against {against}: {numbers}")
    return lines


def on_the_line(results: dict) -> dict[float, dict]:
    "How far from the start (0) beyond the arm (1) → figures; of the one arm of a file that `--along` made."
    arms, found = results["arms"], {}
    for name, about in arms.items():
        kind, times, k = name.split(" ")[0].partition("×")
        if "~" not in kind:
            found[float(k) if times else 0.0 if kind == "start" else 1.0] = about["metrics"]
    return dict(sorted(found.items()))


def plot_line(trials: dict[str, dict]) -> plt.Figure:
    "Figures along the line through the start and the arm of each trial, and after random steps (grey)."
    names = list(next(iter(trials.values()))["arms"]["start"]["metrics"])
    fig, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 2.6), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names):
        for (label, results), colour in zip(trials.items(), (PALETTE[c] for c in ("blue", "green", "red"))):
            line = on_the_line(results)
            ax.plot(list(line), [100 * m[name]["value"] for m in line.values()], "o-", color=colour, ms=4, label=label)
            noise = [100 * a["metrics"][name]["value"] for k, a in results["arms"].items() if "~" in k]
            ax.plot([1] * len(noise), noise, "o", color="0.7", ms=4, zorder=0)
        ax.axvline(0, color="0.85", lw=0.8, zorder=0)
        bare(ax, "start 0, arm 1", title=f"{name}, %")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return fig
