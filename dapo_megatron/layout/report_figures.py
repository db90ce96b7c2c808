"""The figures of a plan's page: memory by stage, time by part, and the whole space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.colors import qualitative

from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.memory import train_needed_bytes
from dapo_megatron.layout.plan import Candidate, Plan, Rejection
from dapo_megatron.layout.report import KIND_WORDS, PHASE_WORDS, describe, gb, saved, train_peak_bytes
from dapo_megatron.layout.search import memory_options
from dapo_megatron.layout.step_time import PHASES, Phase

COLORS = (*qualitative.T10, *qualitative.Pastel, *qualitative.Dark2)
KIND_COLORS = {"memory": "#d1495b", "host_memory": "#8d6a9f", "rule": "#8f8f8f", "release": "#c9a227", "slower": "#b9c9d9"}
FITS_COLOR = "#00798c"
PHASE_COLORS: dict[Phase, tuple[str, ...]] = {
    "rollout": ("#08519c", "#3182bd", "#6baed6", "#9ecae1", "#c6dbef"),
    "log_probs": ("#006d2c", "#31a354", "#74c476", "#a1d99b", "#c7e9c0"),
    "train": ("#a63603", "#d94801", "#f16913", "#fd8d3c", "#fdae6b", "#fdd0a2", "#fee6ce"),
    "sync": ("#54278f", "#756bb1", "#9e9ac8", "#cbc9e2", "#dadaeb"),
}
"""From the first part of a phase on."""
LINEAR_RATIO = 5
"""Of the slowest layout to the fastest: above it the axis of time is logarithmic."""
TICKS = [digit * 10**power for power in range(-1, 6) for digit in (1, 1.5, 2, 3, 4, 5, 6, 8)]
"""Of logarithmic axes."""
FONT = {"family": "system-ui, sans-serif", "size": 13}


def memory_figure(plan: Plan, candidates: Sequence[Candidate]) -> go.Figure:
    """GPU memory of every stage in every phase, stacked by item; a menu chooses the layout."""
    phases = [phase for candidate in candidates for stage in candidate.memory.stages for phase in stage.phases]
    phases += [candidate.memory.engine for candidate in candidates if candidate.memory.engine is not None]
    names = list(dict.fromkeys(item.name for phase in phases for item in phase.items))
    figure = go.Figure()
    for index, candidate in enumerate(candidates):
        accounts = [
            (PHASE_WORDS[phase.phase], f"stage {stage.stage}", phase)
            for number in range(len(candidate.memory.stages[0].phases))
            for stage in candidate.memory.stages
            for phase in (stage.phases[number],)
        ]
        if candidate.memory.engine is not None:
            accounts.append((PHASE_WORDS["rollout"], "engine", candidate.memory.engine))
        places = [[account[0] for account in accounts], [account[1] for account in accounts]]
        for color, name in enumerate(names):
            sizes = [phase.bytes_of(name) / 1e9 for _, _, phase in accounts]
            figure.add_bar(
                x=places,
                y=sizes,
                name=name,
                visible=index == 0,
                showlegend=any(sizes),
                marker_color=COLORS[color % len(COLORS)],
                hovertemplate=name + ": %{y:.2f} GB<extra>%{x}</extra>",
            )
    capacity = plan.request.gpu.memory_bytes / 1e9
    figure.add_hline(capacity, line={"color": "#d1495b", "dash": "dash"}, annotation_text=f"{capacity:.1f} GB of the card")
    menu = [
        {
            "label": _label(place, candidate),
            "method": "update",
            "args": [{"visible": [place - 1 == index // len(names) for index in range(len(candidates) * len(names))]}],
        }
        for place, candidate in enumerate(candidates, 1)
    ]
    figure.update_layout(
        _style(500),
        barmode="stack",
        yaxis_title="GB",
        legend={"traceorder": "reversed"},
        updatemenus=[{"buttons": menu, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}],
        margin_t=70,
    )
    return figure


def time_figure(candidates: Sequence[Candidate]) -> go.Figure:
    """Seconds of one rollout step of every layout, by part."""
    parts = [
        (phase, name, PHASE_COLORS[phase][min(place, len(PHASE_COLORS[phase]) - 1)])
        for phase in PHASES
        for place, name in enumerate(
            dict.fromkeys(item.name for candidate in candidates for item in candidate.time.items if item.phase == phase)
        )
    ]
    labels = [_label(place, candidate) for place, candidate in enumerate(candidates, 1)]
    figure = go.Figure()
    for phase, name, color in parts:
        seconds = [
            sum(item.seconds for item in candidate.time.items if (item.phase, item.name) == (phase, name))
            for candidate in candidates
        ]
        if any(seconds):
            figure.add_bar(
                y=labels,
                x=seconds,
                orientation="h",
                name=name,
                legendgroup=phase,
                legendgrouptitle_text=PHASE_WORDS[phase],
                marker_color=color,
                hovertemplate=f"{PHASE_WORDS[phase]}, {name}: %{{x:.1f}} s<extra>%{{y}}</extra>",
            )
    figure.update_layout(_style(180 + 34 * len(candidates)), barmode="stack", xaxis_title="seconds of a rollout step")
    figure.update_yaxes(autorange="reversed")
    return figure


def space_figure(plan: Plan) -> go.Figure:
    """Memory in training against time of every layout whose time is known; the reason on hover."""
    figure = go.Figure()
    model, options = plan.request.model, memory_options(plan.request)

    def train_gb(layout: Layout) -> float:
        return train_needed_bytes(model, layout, options) / 1e9

    for kind, words in KIND_WORDS.items():
        found = [r for r in plan.rejections if r.kind == kind and r.step_seconds is not None]
        if found:
            figure.add_scatter(
                x=[train_gb(rejection.layout) for rejection in found],
                y=[rejection.step_seconds for rejection in found],
                mode="markers",
                name=f"{words} ({len(found):,})",
                marker={"size": 5, "color": KIND_COLORS[kind], "opacity": 0.55},
                text=[_rejected(rejection) for rejection in found],
                hovertemplate="%{text}<extra></extra>",
            )
    figure.add_scatter(
        x=[train_gb(candidate.layout) for candidate in plan.candidates],
        y=[candidate.time.step_seconds for candidate in plan.candidates],
        mode="markers",
        name=f"fits ({len(plan.candidates):,})",
        marker={"size": 7, "color": FITS_COLOR},
        text=[_fits(place, candidate) for place, candidate in enumerate(plan.candidates, 1)],
        hovertemplate="%{text}<extra></extra>",
    )
    capacity = plan.request.gpu.memory_bytes / 1e9
    figure.add_vline(capacity, line={"color": "#d1495b", "dash": "dash"})
    figure.add_annotation(  # on a logarithmic axis an annotation's place is the exponent
        x=math.log10(capacity), y=1, yref="paper", yanchor="bottom", showarrow=False, text=f"{capacity:.1f} GB of the card"
    )
    figure.update_layout(
        _style(560),
        xaxis_title="GB in training on the fullest GPU",
        yaxis_title="seconds of a rollout step",
        legend={"orientation": "h", "y": -0.12},
    )
    figure.update_xaxes(type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS])
    seconds = [value for trace in figure.data for value in trace.y]
    if seconds and max(seconds) > LINEAR_RATIO * min(seconds):
        figure.update_yaxes(type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS])
    return figure


def _fits(place: int, candidate: Candidate) -> str:
    return (
        f"<b>{place}. {describe(candidate.layout)}</b><br>{gb(train_peak_bytes(candidate))} GB in training, "
        f"{candidate.time.step_seconds:.0f} s<br>limited by {candidate.limit}"
    )


def _rejected(rejection: Rejection) -> str:
    return f"<b>{describe(rejection.layout)}</b><br>{wrapped(rejection.reason)}"


def wrapped(text: str, width: int = 90) -> str:
    """Lines of a hover text."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "<br>".join(lines)


def _label(place: int, candidate: Candidate) -> str:
    return f"{place}. {candidate.layout}, {candidate.layout.max_tokens_per_micro_batch:,} tokens, {saved(candidate.layout)}"


def _style(height: int) -> dict[str, object]:
    return {
        "template": "plotly_white",
        "font": FONT,
        "height": height,
        "margin": {"l": 20, "r": 20, "t": 40, "b": 40},
        "hoverlabel": {"align": "left"},
    }
